"""Is training exact? Properties of every balancing method, ranks against one process, and resumes, as three tables.

    python benchmarks/exactness.py [--steps 20] [--output runs/benchmarks/exactness]

The first table is about numbers alone. For the other two `train.py` runs on a few synthetic frames, in float64 so that
rounding does not hide a mistake: alone, as two ranks, and stopped and resumed on another number of ranks. What is
compared is the largest relative difference ||a - b|| / ||a|| of any tensor of the last checkpoint.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml
from tqdm import tqdm

from a2d2.synthetic.writer import write_dataset
from training.balancing import LOSS_METHODS, Balancer
from training.checkpoint import load_newest_checkpoint
from training.config import GRADIENT_METHODS as GRADIENT_OPTIONS
from training.config import Balancing

ROOT = Path(__file__).resolve().parent.parent
BAR = 1e-9
NAMES = ("a", "b", "c", "d")
CONFIG = {
    "data": {"split": "by_scene", "workers": 0, "augment": {"scale": [1.0, 1.3], "color": 0.2}},
    "model": {
        "encoder": {"name": "test_resnet", "pretrained": False, "norm": "group"},
        "neck": {"width": 32, "repeats": 1},
    },
    "tasks": {
        "segmentation": {"head": {"width": 32}},
        "depth": {"head": {"width": 16, "layers": 1}},
        "detection": {"min_size": 4, "head": {"width": 32, "layers": 1}},
        "steering": {},
    },
    "train": {"micro_batch": 2, "precision": "fp64", "schedule": {"warmup_steps": 2}, "log_every": 5},
    "log": {"tensorboard": False},
}
# an iterative solver with a tolerance of 1e-8 makes more of a last digit
LOOSE = {"balancing.method=nashmtl": 1e-6}
SITUATIONS = {
    "every label there is": ["data.labels=as_is"],
    "symmetric, two micro-batches a step": ["data.labels=symmetric", "train.cycle=2"],
    "one task a frame": ["data.labels=one_task"],
    "a budget of labels": ["data.labels={budget: {segmentation: 0.5, detection: 0.3}}"],
    "ranks that see different tasks": ["data.labels=one_at_a_time"],
    "two tasks, one on each rank": ["tasks.steering=null", "tasks.detection=null", "data.labels=one_at_a_time"],
    "a task that starts late, another that ends": [
        "tasks.depth.train={from_step: 8}", "tasks.detection.train={until_step: 12}",
    ],
    "unlike micro-batches": ["train.micro_batch={segmentation: 1, steering: 5}"],
    "merged": ["train.merge=true", "train.cycle=2"],
    "mean teacher": ["data.labels=one_task", "train.mean_teacher={ramp_steps: 5, true_labels_only_from: 15}"],
    "mean teacher on frames without labels": ["data.labels={budget: {segmentation: 0.3, depth: 0.3}}",
                                              "train.mean_teacher={}", "tasks.detection=null", "tasks.steering=null"],
    "frozen encoder": ["train.freeze=[encoder]"],
    "recomputed neck": ["train.recompute=true"],
    "rows on the host": ["balancing.method=mgda", "balancing.rows=cpu"],
}  # fmt: skip


# ---------------------------------------------------------------- properties


def is_installed(method: str) -> bool:
    try:
        Balancer(NAMES, Balancing(method=method))
    except ImportError:
        return False
    return True


def make_rows(seed: int, count: int = 4) -> torch.Tensor:
    """Gradients of `count` tasks of unlike size, some in conflict."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 40, generator=generator, dtype=torch.float64)
    return rows * torch.tensor([1.0, 10.0, 0.1, 3.0], dtype=torch.float64)[:count, None]


def weigh(method: str, rows: torch.Tensor, names: tuple[str, ...] = NAMES, step: int = 0) -> dict[str, float]:
    """The weights of a fresh balancer, by name."""
    balancer = Balancer(names, Balancing(method=method))
    assert balancer.gradient_method is not None
    return balancer.gradient_method.weigh(step, names, rows @ rows.T)


def differ(one: dict[str, float], other: dict[str, float]) -> float:
    """The largest difference of two sets of weights, relative to the largest weight."""
    largest = max(map(abs, one.values()))
    return max(abs(one[name] - other[name]) for name in one) / largest


def check_single(method: str) -> float:
    """One task alone weighs 1."""
    return abs(weigh(method, make_rows(0, 1), NAMES[:1])["a"] - 1)


def check_equal(method: str) -> float:
    """Equal gradients get equal weights, in the mean over steps where the order is drawn."""
    rows = make_rows(0, 1).expand(3, -1)
    weights = average(method, rows, NAMES[:3])
    return differ(weights, dict.fromkeys(weights, sum(weights.values()) / 3))


def average(method: str, rows: torch.Tensor, names: tuple[str, ...], steps: int = 400) -> dict[str, float]:
    """The mean weights over steps, where a method draws; else the weights."""
    steps = steps if method in ("pcgrad", "gradvac") else 1
    found = [weigh(method, rows, names, step) for step in range(steps)]
    return {name: sum(each[name] for each in found) / steps for name in names}


def check_order(method: str) -> float:
    """The weights do not depend on the order of the tasks, in the mean over steps where the order is drawn."""
    rows, order = make_rows(1), [2, 0, 3, 1]
    turned = average(method, rows[order], tuple(NAMES[index] for index in order))
    return differ(average(method, rows, NAMES), turned)


def check_absent(method: str) -> float:
    """An absent task changes nothing: the others weigh as if it did not exist, and its state stays as it was."""
    rows = make_rows(2)
    balancer = Balancer(NAMES, Balancing(method=method))
    gradient = balancer.gradient_method
    assert gradient is not None
    gradient.weigh(0, NAMES, rows @ rows.T)
    kept = {key: value for key, value in flatten(gradient.state_dict()).items() if "d" in key.split("/")[-1].split(",")}
    fresh = Balancer(NAMES[:3], Balancing(method=method)).gradient_method
    assert fresh is not None
    fresh.weigh(0, NAMES[:3], rows[:3] @ rows[:3].T)
    alone = weigh(method, rows[:3], NAMES[:3], 1)
    present = Balancer(NAMES, Balancing(method=method)).gradient_method
    assert present is not None
    found = present.weigh(1, NAMES[:3], rows[:3] @ rows[:3].T)
    gradient.weigh(1, NAMES[:3], rows[:3] @ rows[:3].T)
    after = flatten(gradient.state_dict())
    return max([differ(alone, found), *(abs(after[key] - value) for key, value in kept.items())])


def flatten(state: dict, prefix: str = "") -> dict[str, float]:
    result: dict[str, float] = {}
    for key, value in state.items():
        if isinstance(value, dict):
            result |= flatten(value, f"{prefix}{key}/")
        else:
            result[f"{prefix}{key}"] = value
    return result


def check_zero(method: str) -> float:
    """A task whose gradient is zero leaves the others' weights as they are."""
    rows = make_rows(3)
    rows[3] = 0
    found = weigh(method, rows)
    return differ(weigh(method, rows[:3], NAMES[:3]), {name: found[name] for name in NAMES[:3]})


def check_resume(method: str) -> float:
    """Weights after saving and restoring, against those of one that went on."""
    one, other = (Balancer(NAMES, Balancing(method=method)).gradient_method for _ in range(2))
    assert one is not None and other is not None
    for step in range(5):
        rows = make_rows(step)
        one.weigh(step, NAMES, rows @ rows.T)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    rows = make_rows(9)
    return differ(one.weigh(9, NAMES, rows @ rows.T), other.weigh(9, NAMES, rows @ rows.T))


def scale_response(method: str) -> str:
    """What a gradient ten times as long does to the length of its part in the sum."""
    rows = make_rows(4)
    longer = rows * torch.tensor([10.0, 1, 1, 1], dtype=torch.float64)[:, None]
    before, after = (average(method, each, NAMES)["a"] for each in (rows, longer))
    return f"{10 * after / before:.2g}" if before else "-"


CHECKS = {
    "alone": check_single,
    "equal": check_equal,
    "order": check_order,
    "absent": check_absent,
    "zero": check_zero,
    "resumed": check_resume,
}
IN_MEAN = {"pcgrad": 0.05, "gradvac": 0.05}  # bars of what holds in the mean over 400 draws
SOLVERS = {"upgrad": 1e-3, "dualproj": 1e-3, "cagrad": 1e-3, "fairgrad": 1e-3, "nashmtl": 1e-1}  # to what they converge


def tabulate_properties() -> tuple[list[str], bool]:
    lines = ["| method | " + " | ".join(CHECKS) + " | x10 gives | |", "|---|" + "---|" * (len(CHECKS) + 2)]
    held = True
    for method in tqdm(GRADIENT_OPTIONS, desc="properties", leave=False):
        if not is_installed(method):
            lines.append(f"| {method} | " + " | ".join([""] * (len(CHECKS) + 1)) + " | not installed |")
            continue
        found = {name: check(method) for name, check in CHECKS.items()}
        bars = {
            name: max(IN_MEAN.get(method, 1e-6) if name in ("equal", "order") else 1e-6, SOLVERS.get(method, 0.0))
            for name in CHECKS
        }
        good = all(found[name] <= bars[name] for name in CHECKS)
        held &= good
        figures = " | ".join(f"{value:.0e}" if value else "0" for value in found.values())
        lines.append(f"| {method} | {figures} | {scale_response(method)} | {'holds' if good else 'MISSED'} |")
    return lines, held


# ---------------------------------------------------------------- trainings


def write_scenes(folder: Path) -> Path:
    """A preprocessed dataset of a few synthetic frames, of which some lack some labels."""
    write_dataset(folder, scenes=5, frames=4, size=(480, 304), workers=2)
    raw = folder / "camera_lidar_semantic_bboxes"
    out = folder / "derived"
    for script in ("camera", "segmentation", "depth_preprocess", "bounding_box", "steering_angle"):
        command = [sys.executable, str(ROOT / "preprocessing" / f"{script}.py"), "--data", str(raw), "--out", str(out)]
        subprocess.run([*command, "--size", "96x64", "--threads", "2"], check=True, capture_output=True)
    for kind, every in (("segmentation", 3), ("depth", 4), ("boxes", 5), ("steering", 2)):
        for path in sorted(out.glob(f"*/{kind}/*/*_{kind}_*"))[::every]:
            path.unlink()
    return out


def find_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start_ranks(ranks: int, arguments: list[str]) -> list[subprocess.Popen]:
    """The processes of a training on so many ranks, as torchrun would start them."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    port = find_port()
    processes = []
    for rank in range(ranks):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1"}
        variables |= {"MASTER_PORT": port}
        own = environment | ({key: str(value) for key, value in variables.items()} if ranks > 1 else {})
        processes.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "train.py"), *arguments],
                env=own, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
        )  # fmt: skip
    return processes


def run(ranks: int, folder: Path, config: Path, options: list[str], stop_at: int | None = None) -> None:
    """Train to the end, or until a signal after the checkpoint of step `stop_at`; RuntimeError with what it printed."""
    arguments = ["--config", str(config), "--run", str(folder), "--resume", *options]
    processes = start_ranks(ranks, arguments)
    wanted = 0
    if stop_at is not None:
        wanted = 75
        checkpoint = folder / "checkpoints" / f"step_{stop_at:08d}.pt"
        while not checkpoint.exists() and all(process.poll() is None for process in processes):
            pass
        for process in processes:
            process.send_signal(signal.SIGTERM)
    printed = [process.communicate()[0] for process in processes]
    codes = [process.returncode for process in processes]
    if codes != [wanted] * ranks:
        raise RuntimeError(f"{ranks} ranks ended with {codes}:\n" + "\n".join(text[-2000:] for text in printed))


def compare(one: Path, other: Path) -> float:
    """The largest relative difference of any tensor of the last checkpoints: weights, averages and the optimizer's."""
    found = [load_newest_checkpoint(folder / "checkpoints") for folder in (one, other)]
    assert found[0] is not None and found[1] is not None and found[0][0] == found[1][0]
    differences = [0.0]
    for part in ("net", "ema", "update"):
        ours, theirs = (list_tensors(state[part]) for _, state in found)
        assert ours.keys() == theirs.keys(), ours.keys() ^ theirs.keys()
        for name, tensor in ours.items():
            scale = float(tensor.double().norm()) or 1.0
            differences.append(float((tensor.double() - theirs[name].double()).norm()) / scale)
    return float(torch.tensor(differences, dtype=torch.float64).max())  # NaN if one is, which max() would pass over


def list_tensors(state: object, prefix: str = "") -> dict[str, torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return {prefix: state}
    pairs = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list | tuple) else ()
    return {key: tensor for name, value in pairs for key, tensor in list_tensors(value, f"{prefix}/{name}").items()}


def tabulate_ranks(scratch: Path, config: Path, steps: int) -> tuple[list[str], bool]:
    methods = [method for method in (*LOSS_METHODS, *GRADIENT_OPTIONS) if is_installed(method)]
    cases = dict(SITUATIONS)
    cases |= {f"method {method}, labels missing": [f"balancing.method={method}"] for method in methods[1:]}
    lines = ["| situation | two ranks against one | |", "|---|---|---|"]
    held = True
    for number, (situation, options) in enumerate(tqdm(cases.items(), desc="ranks", leave=False)):
        folders = [scratch / f"{number}_{ranks}" for ranks in (1, 2)]
        for ranks, folder in zip((1, 2), folders, strict=True):
            run(ranks, folder, config, [*options, f"train.steps={steps}"])
        worst = compare(*folders)
        bar = LOOSE.get(options[0], BAR)
        held &= worst <= bar
        lines.append(f"| {situation} | {worst:.1e} | {'holds' if worst <= bar else 'MISSED'} |")
        for folder in folders:
            shutil.rmtree(folder)
    return lines, held


def tabulate_resumes(scratch: Path, config: Path, steps: int) -> tuple[list[str], bool]:
    options = [f"train.steps={steps}", f"train.save_every={max(steps // 4, 1)}", "train.keep_checkpoints=9"]
    options += ["balancing.method=famo", "balancing.normalise=running", "train.cycle=2"]
    whole = scratch / "whole"
    run(1, whole, config, options)
    lines = ["| ranks, one after the other | against a run that was never stopped | |", "|---|---|---|"]
    held = True
    for ranks in tqdm([(1, 1), (1, 2), (2, 1), (2, 1, 2)], desc="resumes", leave=False):
        folder = scratch / "-".join(map(str, ranks))
        for place, count in enumerate(ranks):
            last = place == len(ranks) - 1
            run(count, folder, config, options, None if last else (place + 1) * max(steps // 4, 1))
        worst = compare(whole, folder)
        bar = 0.0 if set(ranks) == {1} else BAR
        held &= worst <= bar
        lines.append(f"| {' -> '.join(map(str, ranks))} | {worst:.1e} | {'holds' if worst <= bar else 'MISSED'} |")
    return lines, held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=20, help="of each training")
    parser.add_argument("--only", choices=["properties", "ranks", "resumes"], help="one of the tables")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/exactness"), help="without ending")
    arguments = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="benchmark_exactness_"))
    lines: list[str] = []
    held = []
    try:
        if arguments.only in (None, "properties"):
            table, good = tabulate_properties()
            lines += ["Gradient-side methods, largest difference:", "", *table, ""]
            held.append(good)
        if arguments.only != "properties":
            config = scratch / "exactness.yaml"
            data = CONFIG["data"] | {"roots": [str(write_scenes(scratch))]}
            config.write_text(yaml.safe_dump(CONFIG | {"data": data}), encoding="utf-8")
            for name, tabulate in (("ranks", tabulate_ranks), ("resumes", tabulate_resumes)):
                if arguments.only in (None, name):
                    table, good = tabulate(scratch, config, arguments.steps)
                    lines += [
                        f"{name.capitalize()}, after {arguments.steps} steps in float64 (bar {BAR:g}):",
                        "",
                        *table,
                        "",
                    ]
                    held.append(good)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"exactness: {error}", file=sys.stderr)
        return 1
    finally:
        shutil.rmtree(scratch)
    print("\n".join(lines))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0 if all(held) else 1


if __name__ == "__main__":
    sys.exit(main())
