"""Train one network on several tasks, from frames that carry labels for any subset of them.

    python train.py --config configs/demo.yaml [train.steps=100 ...] [--run runs/demo] [--resume]

Leaves a run folder, described in training/run.py.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
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
    collect_label_statistics,
    load_data,
    pick_device,
    read_split,
)
from tasks import TASKS
from tasks.task import Task
from training.balancing import LossWeights, NonFiniteError, Normaliser, backward_cycle
from training.config import Config, ConfigError, load_config
from training.ema import EmaWeights
from training.run import Run, RunState
from training.sampling import CycleSampler, assign_labels, hash_assignment
from training.stopping import StopFlag, StoppedError
from training.updates import UPDATES

DONE, ERROR, WRONG_USE, STOPPED = 0, 1, 2, 75


@dataclass
class Setup:
    """What a run trains on. `frames`: those of the training subset; `assignment`: task -> which of them, by index, have
    a label of it that is used; `size`: (width, height) of the network's input."""

    config: Config
    device: torch.device
    tasks: dict[str, Task]
    split: Split
    data: Data
    frames: list[Frame]
    assignment: dict[str, list[int]]
    size: tuple[int, int]


def prepare(config: Config) -> Setup:
    """Config -> tasks, frames, labels; the tasks hold their label statistics. ValueError says what is missing."""
    device = pick_device(config.train.device)
    tasks = build_tasks(config.tasks)
    check_fit(config.model, tasks)  # mistakes in the config are reported before any file is read
    split = read_split(config.data)
    data = load_data(split, limit=config.data.limit)
    frames = data.subsets["train"]
    if not frames:
        raise ValueError(f"split {split.name!r} has no training frames in {', '.join(split.roots)}")
    has_label = {name: [task.has_label(frame) for frame in frames] for name, task in tasks.items()}
    assignment = assign_labels(has_label, config.data.labels, config.seed)
    if unlabelled := [name for name, indices in assignment.items() if not indices]:
        raise ValueError(
            f"no training frame has a label for {', '.join(unlabelled)} (data.labels={config.data.labels}): run the "
            f"preprocessing scripts, or leave tasks out (tasks.{unlabelled[0]}=null)"
        )
    collect_label_statistics(tasks, frames)
    return Setup(config, device, tasks, split, data, frames, assignment, config.model.input_size or data.size)


def build_state(setup: Setup) -> RunState:
    """The network, its EMA, its optimizers and its loss weights, as they are before the first step."""
    config, device = setup.config, setup.device
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    net = build_network(config.model, setup.tasks, setup.size).to(device, memory_format=memory_format)
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


def set_determinism(config: Config) -> None:
    """Seed PyTorch, and choose how it treats operations that may differ between two runs."""
    torch.manual_seed(config.seed)
    if config.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=config.deterministic == "warn")
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs much, and nothing here reads such memory


def choose_autocast(precision: str, device: torch.device):
    """A function that opens an autocast context for "fp32", "bf16" or "fp16"; "auto" takes bf16 where a GPU has it."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    dtype = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return partial(torch.autocast, device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def load_cycles(setup: Setup, first_step: int) -> Iterator[list[dict[str, Any]]]:
    """The micro-batches of each step from `first_step` (from 0) to the last, loaded by `data.workers` processes."""
    options = setup.config.data
    train = setup.config.train
    sampler = CycleSampler(
        setup.assignment, options.labels, train.micro_batch, train.cycle, setup.config.seed, first_step, train.steps
    )
    augmentation = Augmentation(**options.augment.model_dump())
    dataset = FrameDataset(setup.frames, setup.data.roots, setup.tasks, setup.size, augmentation)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=dataset.collate,
        num_workers=options.workers,
        pin_memory=setup.device.type == "cuda",
        prefetch_factor=4 if options.workers else None,
    )
    batches = iter(loader)
    return ([next(batches) for _ in range(sampler.batches_per_step)] for _ in range(first_step, train.steps))


def validate(setup: Setup, state: RunState, run: Run, stop: StopFlag) -> None:
    """Score on the validation frames, log the scores, and keep the weights if their mean skill is the best so far."""
    options, progress = setup.config.evaluate, state.progress
    frames = setup.data.subsets["val"][: options.limit]
    scores = {}
    if frames:
        workers = min(setup.config.data.workers, 2)
        scores = evaluate(
            state.validated_net, setup.tasks, frames, setup.data, setup.size, setup.device, options.micro_batch,
            workers, stop.check,
        )  # fmt: skip
        run.log.event("evaluate", progress.step, **flatten_scores(scores))
    skill = mean_skill(scores)
    # without scores, the last weights are kept
    if skill is None or progress.best_skill is None or skill > progress.best_skill:
        progress.best_skill = skill
        run.save_best(state, describe_model(setup), scores)
        if scores:
            tqdm.write(format_table({run.folder.name: scores}))
    progress.validated = True


def train(config: Config, folder: Path, resume: bool) -> None:
    """The whole run, from the config to the best weights; StoppedError after a signal."""
    stop = StopFlag()
    set_determinism(config)
    setup = prepare(config)
    state = build_state(setup)
    run = Run(folder, config, resume)
    run.restore(state)
    print_start(setup, state)
    try:
        run_steps(setup, state, run, stop)
    except StoppedError:
        run.save(state)
        raise
    except NonFiniteError as error:
        raise NonFiniteError(f"step {state.progress.step + 1}: {error}; the weights are those before it") from error
    finally:
        run.close()


def run_steps(setup: Setup, state: RunState, run: Run, stop: StopFlag) -> None:
    """The training loop, from the step that `state` has reached to the last."""
    options, progress = setup.config.train, state.progress
    cycles = load_cycles(setup, progress.step)
    if not progress.validated:
        validate(setup, state, run, stop)
    for step in tqdm(range(progress.step, options.steps), initial=progress.step, total=options.steps):
        stop.check()
        cycle = next(cycles)

        # a step: gradients of all tasks, one update
        state.net.train()
        losses, measures = state.update.step(step, cycle, state.balance.weights())
        state.balance.observe(losses)
        progress.step = step + 1
        if state.ema is not None:
            state.ema.update(state.net, step + 1)

        # once in a while: log, validate, save
        last = progress.step == options.steps
        if progress.step % options.log_every == 0 or last:
            losses = {f"loss/{name}": loss for name, loss in losses.items()}
            run.log.event("train", progress.step, **losses, **measures)
        if progress.step % options.evaluate_every == 0 or last:
            progress.validated = False
            validate(setup, state, run, stop)
        if progress.step % options.save_every == 0 or last:
            run.save(state)


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
        "split": dataclasses.asdict(setup.split),
        "assignment": hash_assignment(setup.frames, setup.assignment),
    }


def print_start(setup: Setup, state: RunState) -> None:
    """Print what is about to be trained on what."""
    if not setup.data.subsets["val"]:
        tqdm.write(f"warning: split {setup.split.name!r} has no validation frames here; the last weights are kept")
    parameters = sum(parameter.numel() for parameter in state.net.parameters())
    labels = ", ".join(f"{name} {len(indices)}" for name, indices in setup.assignment.items())
    sizes = ", ".join(f"{subset} {len(frames)}" for subset, frames in setup.data.subsets.items())
    tqdm.write(f"{parameters / 1e6:.1f} M parameters on {setup.device}; frames: {sizes}; training labels: {labels}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--config", required=True, type=Path, help="YAML file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options that replace the file's")
    parser.add_argument("--run", type=Path, help="run folder (default: runs/ and the name of the config)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in that folder, if there is one")
    arguments = parser.parse_intermixed_args()
    try:
        config = load_config(
            arguments.config, arguments.overrides, {name: task.Options for name, task in TASKS.items()}
        )
        folder = arguments.run or Path("runs") / config.run
        train(config, folder, arguments.resume)
    except (ConfigError, WrongUseError) as error:
        print(f"train: {error}", file=sys.stderr)
        return WRONG_USE
    except StoppedError:
        print(f"train: stopped; the same command with --resume goes on from {folder}", file=sys.stderr)
        return STOPPED
    except (OSError, ValueError, NonFiniteError) as error:
        print(f"train: {error}", file=sys.stderr)
        return ERROR
    print(f"best weights: {folder / 'best.safetensors'}")
    return DONE


if __name__ == "__main__":
    sys.exit(main())
