"""Train what is missing of a grid, and keep the results.

    python experiments/run.py configs/study/main.yaml --dry-run              # how many runs are left, what they cost
    python experiments/run.py configs/study/main.yaml [--only PATTERN ...] [--jobs 2]

A run that was stopped goes on where it was, and one whose result is in experiments/results/ is not repeated. The test
subset is not looked at here: experiments/tabulate.py opens it.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:
    # as a script, from any folder and uninstalled; in place of this folder, whose files have other packages' names
    sys.path[0] = str(ROOT)

from a2d2.console import allow_any_text
from training.arguments import count

DONE, ERROR, WRONG_USE, STOPPED = 0, 1, 2, 75


def parse_weights(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not Path(path).is_file():
        raise argparse.ArgumentTypeError(f"{text!r}: write ENCODER=FILE, where FILE is there")
    return name, path


def read_arguments() -> argparse.Namespace:
    allow_any_text()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("grid", type=Path, help="YAML file; see configs/study/")
    parser.add_argument(
        "--only", nargs="+", default=["*"], metavar="PATTERN",
        help="runs by name, ARM.NETWORK.SEED, such as 'one_label_single.*'; what they need is run too",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print what is left, and do nothing")
    parser.add_argument(
        "--jobs", type=count, default=1,
        help="runs at a time, each with its share of the cores, or OMP_NUM_THREADS if that is set",
    )  # fmt: skip
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder for runs and pseudo-labels")
    parser.add_argument("--results", type=Path, help="folder of the results (default: experiments/results/GRID)")
    parser.add_argument(
        "--weights", nargs="+", default=[], metavar="ENCODER=FILE", type=parse_weights,
        help="ImageNet weights of an encoder, where timm's cannot be fetched",
    )  # fmt: skip
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    return parser.parse_args()


if __name__ == "__main__":
    ARGUMENTS = read_arguments()

import os
import shlex
import shutil
import signal
import subprocess
import threading
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any

from tqdm import tqdm

from a2d2.images import read_json
from a2d2.predictions import digest_file
from experiments.cost import CostCounter, Work
from experiments.grid import OWN, WEIGHTS, Grid, GridError, Run, SyntheticSet, has_weights, read_grid
from scoring.table import layout
from training.log import describe_machine
from training.sampling import parse_assignment

SCRIPTS = ("camera", "segmentation", "depth_preprocess", "bounding_box", "steering_angle")
NOT_FINITE = "is not finite"  # a failure that is a result


class RunError(RuntimeError):
    """A run that could not be finished, for a reason that is no result; the message ends the program."""


class StoppedError(RuntimeError):
    """The user or the machine has asked to stop."""


@dataclass
class Worker:
    """Starts programs, and stops them when it is told to. `threads`: of each, unless the environment says it. `locks`:
    for each run that others need the weights of, held while they or its pseudo-labels are made: two students that begin
    at once must not both do it."""

    runs: Path
    threads: int
    device: str
    processes: set = field(default_factory=set)
    stopping: threading.Event = field(default_factory=threading.Event)
    locks: dict[str, threading.Lock] = field(default_factory=dict)

    def call(self, command: Sequence[str], log: Path) -> str:
        """The end of what a program has printed. RunError if it fails, StoppedError if it was stopped."""
        if self.stopping.is_set():
            raise StoppedError
        log.parent.mkdir(parents=True, exist_ok=True)
        # whoever shares the cores with others sets it to less: threads without a core of their own wait for each other
        environment = {"OMP_NUM_THREADS": str(self.threads)} | os.environ
        with log.open("ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            start = file.tell()
            process = subprocess.Popen(
                [sys.executable, *command], cwd=ROOT, stdout=file, stderr=file, env=environment,
                start_new_session=True,
            )  # fmt: skip
            self.processes.add(process)
            if self.stopping.is_set():
                process.terminate()
            code = process.wait()
            self.processes.discard(process)
        with log.open("rb") as file:
            file.seek(start)
            printed = file.read().decode(errors="replace")
        if code == STOPPED or (code and self.stopping.is_set()):
            raise StoppedError
        if code:
            lines = [line for line in printed.replace("\r", "\n").splitlines() if line.strip()]
            raise RunError(
                f"{shlex.join(command)} ended with exit code {code}: {lines[-1] if lines else ''}; see {log}"
            )
        return printed

    def stop(self) -> None:
        self.stopping.set()
        for process in list(self.processes):
            process.terminate()


def prepare_dataset(dataset: SyntheticSet, worker: Worker) -> None:
    """Write the dataset, as far as it is not there."""
    log = worker.runs / "dataset.log"
    finished = Path(dataset.out) / "processed" / dataset.processed / "reports" / "steering.json"
    command = ["-m", "a2d2.synthetic", "--out", dataset.out, "--scenes", f"{dataset.scenes}", "--frames"]
    command += [f"{dataset.frames}", "--size", dataset.size, "--seed", f"{dataset.seed}", "--roads", dataset.roads]
    # also where all is there: it refuses a folder with another dataset
    worker.call([*command, "--complete"], log)
    if finished.is_file():
        return
    print(f"writing the dataset into {dataset.out}, {dataset.scenes * dataset.frames} frames; see {log}")
    for script in SCRIPTS:
        data = Path(dataset.out) / "camera_lidar_semantic_bboxes"
        worker.call([f"preprocessing/{script}.py", "--data", str(data), "--size", dataset.processed, "--strict"], log)


def perform(grid: Grid, run: Run, worker: Worker, work: Work) -> None:
    """Train one run and keep its result; one that was trained here under another name is not trained again."""
    about = grid.identify(run)
    twin = grid.find_twin(run)
    found = None if twin is None else grid.read_result(twin)
    if twin is not None and found is not None and has_weights(found, worker.runs / twin.name):
        copy_run(worker.runs / twin.name, worker.runs / run.name, found)
        grid.write_result(run, {key: value for key, value in found.items() if key not in OWN} | about)
        return
    result: dict[str, Any] = about | {
        "skill": None,
        "val": {},
        "weights": None,
        "teachers": {},
        "cost": work.to_result(),
        "made": {key: value for key, value in describe_machine().items() if key != "system"},
    }
    for teacher in run.teachers:
        if (found := grid.read_result(teacher)) and found["failed"]:
            grid.write_result(run, result | {"failed": f"its teacher {teacher.name} has failed"})
            return
    folder, log = worker.runs / run.name, worker.runs / "logs" / f"{run.name}.log"
    roots = []
    for teacher in run.teachers:
        root, digest = label_frames(grid, teacher, worker)
        roots.append(str(root))
        result["teachers"][teacher.name] = digest
    config = grid.resolve(run, roots)
    command = list_training_command(grid, run, roots, folder, worker.device)
    result["command"] = shlex.join(["python", "train.py", *grid.list_arguments(run, roots, local=False)])
    try:
        worker.call(command, log)
    except RunError as error:
        if NOT_FINITE not in str(error):
            raise
        grid.write_result(run, result | {"failed": str(error).partition("; see ")[0]})
        return
    best = read_json(folder / "best.json")
    scores = {
        name: {key: score[key] for key in ("headline", "score", "constant", "skill", "frames")}
        for name, score in best["scores"].items()
    }
    assignment = parse_assignment((folder / "assignment.json").read_text(encoding="utf-8"))
    labels = {name: len(names) for name, names in assignment.items()}
    result |= {"failed": None, "skill": best["skill"], "step": best["step"], "labels": labels, "val": scores}
    result["weights"] = digest_file(folder / WEIGHTS)
    assert set(scores) == set(config.tasks), (run.name, set(scores))
    grid.write_result(run, result)


def copy_run(source: Path, folder: Path, result: Mapping[str, Any]) -> None:
    """Copy the folder of a run with this result, whole or not at all, over one with other weights or none."""
    if has_weights(result, folder):
        return
    partial = folder.with_name(f".{folder.name}.partial")
    for leftover in (partial, folder):
        if leftover.exists():
            shutil.rmtree(leftover)
    shutil.copytree(source, partial)
    partial.rename(folder)


def list_training_command(grid: Grid, run: Run, roots: Sequence[str], folder: Path, device: str) -> list[str]:
    return ["train.py", *grid.list_arguments(run, roots), f"train.device={device}", "--run", str(folder), "--resume"]


def label_frames(grid: Grid, teacher: Run, worker: Worker) -> tuple[Path, str]:
    """The pseudo-labels of a teacher for the training frames, made if they are not there, and the digest of the weights
    that have made them."""
    out = worker.runs / "pseudo" / teacher.name
    calibration = grid.find_calibration(teacher)
    with worker.locks.setdefault(teacher.name, threading.Lock()):
        options = ["--out", str(out), "--device", worker.device, "--workers", "0"]
        if calibration is not None:
            with worker.locks.setdefault(calibration.name, threading.Lock()):
                options += ["--calibrate", str(find_weights(grid, calibration, worker).parent)]
        weights = find_weights(grid, teacher, worker)
        worker.call(["pseudo_label.py", str(weights.parent), *options], worker.runs / "logs" / f"{teacher.name}.log")
        return out, digest_file(weights)


def find_weights(grid: Grid, run: Run, worker: Worker) -> Path:
    """The weights of a finished run. Where only its result was kept, or weights are others, it is trained again, and
    the result replaced: it is to be that of the weights that others learn from."""
    folder = worker.runs / run.name
    kept = grid.read_result(run)
    assert kept is not None, run.name
    if not has_weights(kept, folder):
        perform(grid, run, worker, Work.from_result(kept["cost"]))
        again = grid.read_result(run)
        if again is None or again["failed"]:
            raise RunError(f"{run.name} was trained again for its students, and has failed or differs")
    return folder / WEIGHTS


def choose_runs(grid: Grid, patterns: Collection[str]) -> list[Run]:
    """The runs whose names fit, and all that these need."""
    everyone = {run.name: run for run in grid.list_runs()}
    chosen: set[str] = set()
    waiting = [run for run in everyone.values() if any(fnmatch(run.name, pattern) for pattern in patterns)]
    if not waiting:
        raise GridError(f"{grid.path}: no run is called {' or '.join(patterns)}; there are {', '.join(everyone)}")
    while waiting:
        run = waiting.pop()
        if run.name not in chosen:
            chosen.add(run.name)
            waiting += [*grid.list_needed(run)]
    return [run for run in everyone.values() if run.name in chosen]


def is_done(grid: Grid, run: Run) -> bool:
    try:
        return grid.read_result(run) is not None
    except KeyError:
        return False


def list_repeated(grid: Grid, left: Sequence[Run], folder: Path) -> set[str]:
    """Names of the finished runs that are trained again, because students that are left need their weights, and these
    are not in the folder of the runs."""
    repeated = set()
    for run in left:
        calibrations = [grid.find_calibration(teacher) for teacher in run.teachers]
        for other in (*run.teachers, *(each for each in calibrations if each is not None)):
            if other.name not in repeated and is_done(grid, other):
                result = grid.read_result(other)
                assert result is not None
                repeated |= set() if result["failed"] or has_weights(result, folder / other.name) else {other.name}
    return repeated


def describe_plan(grid: Grid, runs: Sequence[Run], folder: Path) -> str:
    """A line for each arm: runs that are done, that are left, and that are done again for their weights, and what the
    latter two cost."""
    counter = CostCounter(grid)
    finished = {run.name for run in runs if is_done(grid, run)}
    repeated = list_repeated(grid, [run for run in runs if run.name not in finished], folder)
    rows = [["arm", "done", "left", "again", "cycles", "images", "TFLOP"]]
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(f"tuning of {run.arm}" if run.is_tuning else run.arm, []).append(run)
    for name, members in [*groups.items(), ("all", list(runs))]:
        left = [run for run in members if run.name not in finished]
        again = [run for run in members if run.name in repeated]
        work = sum((counter.count(run, tuned=False) for run in (*left, *again)), Work())
        numbers = (len(members) - len(left), len(left), len(again), work.cycles, work.images)
        rows.append([name, *map(str, numbers), f"{work.flops / 1e12:.1f}"])
    return "\n".join(layout(rows[0], rows[1:]))


def run_all(grid: Grid, runs: Sequence[Run], worker: Worker, jobs: int) -> int:
    """Train all runs, the first seed of every arm first; returns how many were trained."""
    counter = CostCounter(grid)
    done = {run.name for run in runs if is_done(grid, run)}  # asked once: an answer reads all configs behind a run
    left = [run for run in runs if run.name not in done]
    left.sort(key=lambda run: run.seed)  # all arms by seed, so that a stopped grid has whole comparisons
    total = sum(counter.count(run, tuned=False).images for run in left)
    trained = 0
    pool, busy = ThreadPoolExecutor(jobs), {}
    with tqdm(total=total, desc="images", unit="image", unit_scale=True) as bar:
        try:
            while left or busy:
                ready = [run for run in left if all(other.name in done for other in grid.list_needed(run))]
                for run in ready[: jobs - len(busy)]:
                    left.remove(run)
                    work = counter.count(run)
                    busy[pool.submit(perform, grid, run, worker, work)] = (run, work)
                bar.set_postfix_str(", ".join(run.name for run, _ in busy.values()))
                finished, _ = wait(busy, timeout=1, return_when=FIRST_COMPLETED)
                for future in finished:
                    run, work = busy.pop(future)
                    future.result()
                    done.add(run.name)
                    trained += 1
                    bar.update(work.images)
                    tqdm.write(describe_result(grid, run))
        except BaseException:
            worker.stop()
            raise
        finally:
            pool.shutdown(cancel_futures=True)
    return trained


def describe_result(grid: Grid, run: Run) -> str:
    result = grid.read_result(run)
    assert result is not None
    if result["failed"]:
        return f"{run.name}: failed: {result['failed']}"
    scores = ", ".join(f"{name} {score['headline']} {score['score']:.4f}" for name, score in result["val"].items())
    return f"{run.name}: {scores}"


def interrupt(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main(arguments: argparse.Namespace | None = None) -> int:
    arguments = arguments or read_arguments()
    worker = None
    try:
        grid = read_grid(arguments.grid, dict(arguments.weights), arguments.results)
        runs = choose_runs(grid, arguments.only)
        if arguments.dry_run:
            print(describe_plan(grid, runs, arguments.runs))
            return DONE
        cores = len(os.sched_getaffinity(0))
        worker = Worker(arguments.runs, max(1, cores // arguments.jobs), arguments.device)
        for each in (signal.SIGTERM, signal.SIGINT):  # the latter too: a shell ignores it for what it starts behind it
            signal.signal(each, interrupt)
        if isinstance(grid.study.dataset, SyntheticSet):
            prepare_dataset(grid.study.dataset, worker)
        trained = run_all(grid, runs, worker, arguments.jobs)
    except GridError as error:
        print(f"run: {error}", file=sys.stderr)
        return WRONG_USE
    except (KeyboardInterrupt, StoppedError):
        print("run: stopped; the same command goes on", file=sys.stderr)
        return STOPPED
    except (RunError, OSError, ValueError) as error:
        print(f"run: {error}; the same command goes on", file=sys.stderr)
        return ERROR
    print(f"{trained} runs trained, {len(runs) - trained} were there; results in {grid.results}")
    return DONE


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
