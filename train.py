"""Train one network on several tasks, from frames that carry labels for any subset of them.

    python train.py --config configs/demo.yaml [train.steps=100 ...] [--run runs/demo] [--resume]

Leaves a run folder, described in training/run.py.
"""

import argparse
import sys
from pathlib import Path

from a2d2.console import allow_any_text
from tasks.options import OPTIONS
from training.config import Config, ConfigError, load_config
from training.stopping import StopFlag, StoppedError

DONE, ERROR, WRONG_USE, STOPPED = 0, 1, 2, 75


def read_arguments() -> tuple[Config, Path, bool]:
    """The config, the run folder and --resume from the command line; exits for a mistake in them."""
    allow_any_text()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", required=True, type=Path, help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the file's")
    parser.add_argument("--run", type=Path, help="run folder (default: runs/ and the name of the config)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder, if there is one")
    arguments = parser.parse_intermixed_args()
    try:
        config = load_config(arguments.config, arguments.overrides, OPTIONS)
    except ConfigError as error:
        print(f"train: {error}", file=sys.stderr)
        sys.exit(WRONG_USE)
    return config, arguments.run or Path("runs") / config.run, arguments.resume


if __name__ == "__main__":
    # before the slow imports, so that help and mistakes take no time and no signal is missed
    COMMAND = read_arguments()
    STOP = StopFlag()

import random
import warnings
from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from a2d2.dataset import Augmentation, FrameDataset
from a2d2.frames import Frame
from evaluate import Scores, evaluate, format_table, mean_skill
from experiment import (
    Data,
    Split,
    WrongUseError,
    build_network,
    build_tasks,
    check_fit,
    check_recorded_data,
    collect_label_statistics,
    find_ancestors,
    find_labels,
    initialise,
    load_data,
    load_recorded_data,
    pick_device,
    read_split,
)
from tasks.task import Task
from training.balancing import LossWeights, NonFiniteError, Normaliser, backward_cycle
from training.ema import EmaWeights
from training.loading import WorkerError, explain_memory, explain_worker_death, load_batches
from training.record import Record
from training.run import Run, RunState
from training.sampling import CycleSampler, assign_labels, hash_assignment
from training.updates import UPDATES


@dataclass
class Setup:
    """What a run trains on. `frames`: those of the training subset; `assignment`: task -> which of them, by index, have
    a label of it that is used; `labels`: task -> all frames whose label of it may be used; `size`: (width, height) of
    the network's input."""

    config: Config
    device: torch.device
    tasks: dict[str, Task]
    split: Split
    data: Data
    record: Record
    frames: list[Frame]
    labels: dict[str, frozenset[Frame]]
    assignment: dict[str, list[int]]
    size: tuple[int, int]


def prepare(config: Config, record: Record | None = None) -> Setup:
    """Config -> tasks, frames, labels; the tasks hold their label statistics. ValueError says what is missing.

    With the record of a run that is resumed, frames, labels and statistics are those it started with.
    """
    device = pick_device(config.train.device)
    if config.train.precision == "fp16" and device.type == "cpu":
        raise WrongUseError("train.precision=fp16 is for a GPU; take fp32 or bf16 on the CPU")
    tasks = build_tasks(config.tasks, record and dict(record.label_statistics))
    check_fit(config.model, tasks)  # mistakes in the config are reported before any file is read
    split = read_split(config.data)
    if record is None:
        data = load_data(split, limit=config.data.limit)
        labels = find_labels(tasks, data, split.views)
        record, assignment = start_record(config, tasks, data, labels)
    else:
        data = load_recorded_data(record, split)
        labels = find_labels(tasks, data, split.views)
        for note in check_recorded_data(record, data, labels, [task.kind for task in tasks.values()]):
            tqdm.write(note)
        by_name = {str(frame): frame for members in data.subsets.values() for frame in members}
        labels = {
            name: frozenset(by_name[frame] for frame in record.labels[name] if frame in by_name) for name in tasks
        }
        assignment = assign_training_labels(config, data.subsets["train"], labels)
    frames = data.subsets["train"]
    if hash_assignment(frames, assignment) != record.assignment:
        raise ValueError(
            "the labels that this run was trained on are assigned to tasks in another way now, so the code has "
            "changed: finish the run with the version that began it, or start another with --run"
        )
    return Setup(
        config, device, tasks, split, data, record, frames, labels, assignment, config.model.input_size or data.size
    )


def start_record(
    config: Config, tasks: dict[str, Task], data: Data, labels: dict[str, frozenset[Frame]]
) -> tuple[Record, dict[str, list[int]]]:
    """The record of a new run, and its assignment of training labels to tasks.

    The tasks get their label statistics, from the labels that are trained on alone.
    """
    inherited = find_ancestors(config)
    known = set(inherited or ())
    for subset in ("val", "test"):
        kept = [frame for frame in data.subsets[subset] if str(frame) not in known]
        if left_out := len(data.subsets[subset]) - len(kept):
            tqdm.write(f"{left_out} {subset} frames are left out: the run this one starts from was trained on them")
        data.subsets[subset] = kept
    if inherited is None:
        tqdm.write("warning: nothing says which frames the given weights were trained on; validation may score them")
    frames = data.subsets["train"]
    if not frames:
        raise ValueError(f"split {config.data.split!r} has no training frames in {', '.join(map(str, data.roots))}")
    assignment = assign_training_labels(config, frames, labels)
    check_labels(config, frames, labels, assignment)
    collect_label_statistics(
        tasks, {name: [frames[index] for index in indices] for name, indices in assignment.items()},
        config.evaluate.protocol, data.roots,
    )  # fmt: skip
    everywhere = [frame for members in data.subsets.values() for frame in members]
    record = Record(
        {subset: tuple(map(str, members)) for subset, members in data.subsets.items()},
        {name: tuple(str(frame) for frame in everywhere if frame in found) for name, found in labels.items()},
        {name: task.label_statistics for name, task in tasks.items()},
        hash_assignment(frames, assignment),
        data.find_identity([task.kind for task in tasks.values()]),
        inherited,
    )
    return record, assignment


def assign_training_labels(
    config: Config, frames: list[Frame], labels: dict[str, frozenset[Frame]]
) -> dict[str, list[int]]:
    """Task -> the training frames, by index, whose label of it the regime uses."""
    has_label = {name: [frame in found for frame in frames] for name, found in labels.items()}
    return assign_labels(has_label, config.data.labels, config.seed)


def check_labels(
    config: Config, frames: list[Frame], labels: dict[str, frozenset[Frame]], assignment: dict[str, list[int]]
) -> None:
    """ValueError, with what to do, if a task has no training label."""
    if bare := [name for name, found in labels.items() if not any(frame in found for frame in frames)]:
        raise ValueError(
            f"no training frame has a label for {', '.join(bare)}: run the preprocessing scripts, or leave the task "
            f"out (tasks.{bare[0]}=null)"
        )
    if starved := [name for name, indices in assignment.items() if not indices]:
        counts = {name: sum(frame in found for frame in frames) for name, found in labels.items()}
        listed = ", ".join(f"{name} {number}" for name, number in counts.items())
        raise ValueError(
            f"data.labels={config.data.labels} leaves no training frame for {', '.join(starved)}, of {len(frames)} "
            f"frames with these labels: {listed}. Take another regime, or leave a task out"
        )


def build_state(setup: Setup, load_pretrained: bool = True) -> RunState:
    """The network, its EMA, its optimizers and its loss weights, as they are before the first step.

    Without `load_pretrained` the weights are those of no file, because a checkpoint follows."""
    config, device = setup.config, setup.device
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    net = build_network(config.model, setup.tasks, setup.size, load_pretrained)
    if config.train.init is not None and load_pretrained:
        for note in initialise(net, config.train.init):
            tqdm.write(note)
    net = net.to(device, memory_format=memory_format)
    ema = None if config.train.ema is None else EmaWeights(net, **config.train.ema.model_dump())
    normaliser = Normaliser(setup.tasks)
    backward = partial(
        backward_cycle,
        net,
        tasks=setup.tasks,
        device=device,
        autocast=choose_autocast(config.train.precision, device),
        memory_format=memory_format,
        normaliser=normaliser,
    )
    update = UPDATES[config.train.update](net, config.train, backward)
    balance = LossWeights(list(setup.tasks), config.balancing.weights, config.balancing.normalise)
    return RunState(net, ema, update, balance, normaliser)


def set_determinism(config: Config, device: torch.device) -> None:
    """Seed PyTorch, and choose how it treats operations that may differ between two runs.

    Determinism is free on the CPU. On a GPU it has a price, as every resize of a map is then made of many small
    operations, so there it has to be asked for.
    """
    torch.manual_seed(config.seed)
    wanted = device.type == "cpu" if config.deterministic == "auto" else bool(config.deterministic)
    torch.use_deterministic_algorithms(wanted, warn_only=config.deterministic is not True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs much, and nothing here reads such memory
    warnings.filterwarnings("once", message=".*deterministic")


def choose_autocast(precision: str, device: torch.device):
    """A function that opens an autocast context for "fp32", "bf16" or "fp16"; "auto" takes bf16 where a GPU has it."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return partial(torch.autocast, device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def load_cycles(setup: Setup, first_step: int) -> Generator[list[dict[str, Any]], None, None]:
    """The micro-batches of each step from `first_step` (from 0) to the last, loaded by `data.workers` processes.

    `seed` of a micro-batch is a function of the config's seed, the step, and its number in the step: what layers draw
    is then the same in a run that was resumed.
    """
    options = setup.config.data
    train = setup.config.train
    sampler = CycleSampler(
        setup.assignment, options.labels, train.micro_batch, train.cycle, setup.config.seed, first_step, train.steps
    )
    augmentation = Augmentation(**options.augment.model_dump())
    dataset = FrameDataset(setup.frames, setup.data.roots, setup.tasks, setup.size, augmentation, labels=setup.labels)
    with closing(load_batches(dataset, options.workers, setup.device, batch_sampler=sampler)) as batches:
        for step in range(first_step, train.steps):
            seeds = random.Random(f"layers {setup.config.seed} {step}")
            yield [next(batches) | {"seed": seeds.getrandbits(63)} for _ in range(sampler.batches_per_step)]


def validate(setup: Setup, state: RunState, run: Run, stop: StopFlag) -> None:
    """Score on the validation frames, log the scores, and keep the weights if their mean skill is the best so far."""
    options, progress = setup.config.evaluate, state.progress
    frames = setup.data.subsets["val"][: options.limit]
    scores = {}
    if frames:
        workers = min(setup.config.data.workers, 2)
        scores = evaluate(
            state.validated_net, setup.tasks, frames, setup.data, setup.size, setup.device, options.micro_batch,
            workers, stop.check, options.protocol, setup.labels,
        )  # fmt: skip
        run.log.event("evaluate", progress.step, **flatten_scores(scores))
        for score in scores.values():
            del score["scored_frames"]  # they are in the record
    skill = mean_skill(scores)
    # without scores, the last weights are kept
    if skill is None or progress.best_skill is None or skill > progress.best_skill:
        progress.best_skill = skill
        run.save_best(state, describe_model(setup), scores)
        if scores:
            tqdm.write(format_table({run.folder.name: scores}))
    progress.validated = True


def train(config: Config, folder: Path, resume: bool, stop: StopFlag | None = None) -> None:
    """The whole run, from the config to the best weights; StoppedError after a signal."""
    stop = stop or StopFlag()
    set_determinism(config, pick_device(config.train.device))
    run = Run(folder, config, resume)
    try:
        if run.progress.step == config.train.steps and run.progress.validated:
            tqdm.write(f"{folder} is finished: all {config.train.steps} steps are done")
            return
        setup = prepare(config, run.record)
        state = build_state(setup, load_pretrained=not run.progress.step)
        run.start(setup.record, state)
        print_start(setup, state)
        run_steps(setup, state, run, stop)
    finally:
        run.close()


def run_steps(setup: Setup, state: RunState, run: Run, stop: StopFlag) -> None:
    """The training loop, from the step that `state` has reached to the last; whatever ends it, its work is kept."""
    options, progress = setup.config.train, state.progress
    cycles = load_cycles(setup, progress.step)
    between_steps = True
    try:
        if not progress.validated:
            validate(setup, state, run, stop)
            run.save(state)
        for step in tqdm(range(progress.step, options.steps), initial=progress.step, total=options.steps):
            stop.check()
            cycle = next(cycles)

            # a step: gradients of all tasks, one update
            between_steps = False
            state.net.train()
            losses, measures = state.update.step(step, cycle, state.balance.weights())
            state.balance.observe(losses)
            progress.step = step + 1
            if state.ema is not None:
                state.ema.update(state.net, step + 1)
            between_steps = True

            # once in a while: log, save, validate; saving comes first, because validation reads other files
            last = progress.step == options.steps
            progress.validated = not (last or progress.step % options.evaluate_every == 0)
            if progress.step % options.log_every == 0 or last:
                losses = {f"loss/{name}": loss for name, loss in losses.items()}
                run.log.event("train", progress.step, **losses, **measures)
            if not progress.validated or progress.step % options.save_every == 0:
                run.save(state)
            if not progress.validated:
                validate(setup, state, run, stop)
        run.save(state)
    except NonFiniteError as error:
        raise NonFiniteError(f"step {progress.step + 1}: {error}; the weights are those before it") from error
    except Exception as error:
        if between_steps:
            save_after(error, state, run)
        raise
    finally:
        cycles.close()


def save_after(error: Exception, state: RunState, run: Run) -> None:
    """Keep the work of a run that an error ends; if that fails, too, the checkpoint before stays the newest."""
    try:
        run.save(state)
    except OSError as second:
        tqdm.write(f"train: step {state.progress.step} could not be saved: {second}", file=sys.stderr)
    else:
        if not isinstance(error, StoppedError):
            tqdm.write(f"train: step {state.progress.step} is saved, --resume goes on from there", file=sys.stderr)


def flatten_scores(scores: Scores) -> dict[str, float]:
    """Primary metrics and skills by name, for the log; what is not defined is left out."""
    values = {f"{name}/{score['headline']}": score["score"] for name, score in scores.items()}
    values |= {f"{name}/skill": score["skill"] for name, score in scores.items()}
    values["skill"] = mean_skill(scores)
    return {name: value for name, value in values.items() if value is not None}


def describe_model(setup: Setup) -> dict[str, Any]:
    """The header of a weights file: what is needed to use it without the config."""
    return {
        "model": setup.config.model.model_dump(mode="json"),
        "tasks": {name: task.options.model_dump(mode="json") for name, task in setup.tasks.items()},
        "fitted": {name: task.label_statistics for name, task in setup.tasks.items()},
        "input_size": list(setup.size),
        "cameras": {
            str(path): {view: matrix.tolist() for view, matrix in root.cameras.items()}
            for path, root in setup.data.roots.items()
        },
        "split": asdict(setup.split),
        "record": setup.record.to_dict(with_labels=False),
        "protocol": setup.config.evaluate.protocol.model_dump(mode="json"),
        "assignment": setup.record.assignment,
    }


def print_start(setup: Setup, state: RunState) -> None:
    """Print what is about to be trained on what."""
    if not setup.data.subsets["val"]:
        tqdm.write(f"warning: split {setup.split.name!r} has no validation frames here; the last weights are kept")
    parameters = sum(parameter.numel() for parameter in state.net.parameters())
    labels = ", ".join(f"{name} {len(indices)}" for name, indices in setup.assignment.items())
    sizes = ", ".join(f"{subset} {len(frames)}" for subset, frames in setup.data.subsets.items())
    tqdm.write(f"{parameters / 1e6:.1f} M parameters on {setup.device}; frames: {sizes}; training labels: {labels}")


def main(command: tuple[Config, Path, bool] | None = None, stop: StopFlag | None = None) -> int:
    config, folder, resume = command or read_arguments()
    try:
        train(config, folder, resume, stop)
    except WrongUseError as error:
        print(f"train: {error}", file=sys.stderr)
        return WRONG_USE
    except StoppedError:
        print(f"train: stopped; the same command with --resume goes on from {folder}", file=sys.stderr)
        return STOPPED
    except (OSError, ValueError, NonFiniteError, WorkerError) as error:
        print(f"train: {error}", file=sys.stderr)
        return ERROR
    except (RuntimeError, MemoryError) as error:
        if (explanation := explain_memory(error) or explain_worker_death(error)) is None:
            raise
        print(f"train: {explanation}", file=sys.stderr)
        return ERROR
    if (folder / "best.safetensors").exists():
        print(f"best weights: {folder / 'best.safetensors'}")
    return DONE


if __name__ == "__main__":
    sys.exit(main(COMMAND, STOP))
