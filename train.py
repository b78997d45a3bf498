"""Train one network on several tasks, from frames that carry labels for any subset of them.

    python train.py --config configs/demo.yaml [train.steps=100 ...] [--run runs/demo] [--resume]

Leaves a run folder: config.yaml (resolved), environment.json, metrics.jsonl, tensorboard/, checkpoints/,
best.safetensors (the averaged weights at the best evaluation) and best.json (its scores).
"""

import argparse
import copy
import dataclasses
import math
import signal
import sys
from functools import partial
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.utils.data import DataLoader
from tqdm import tqdm

from a2d2.dataset import Augmentation, FrameDataset
from build import (
    Data,
    Split,
    WrongUseError,
    build_network,
    build_tasks,
    check_fit,
    fit_tasks,
    load_data,
    pick_device,
    read_split,
)
from evaluate import Scores, evaluate, format_table, mean_skill
from tasks import TASKS
from tasks.task import Task
from training.balancing import LossWeights, NonFiniteError, backward_cycle
from training.checkpoint import load_newest_checkpoint, save_checkpoint, save_weights, write_json
from training.config import Config, ConfigError, config_to_dict, load_config, save_config
from training.log import RunLog, write_environment
from training.sampling import CycleSampler, assign_labels, hash_assignment
from training.updates import UPDATES

DONE, ERROR, WRONG_USE, STOPPED = 0, 1, 2, 75


class StoppedError(Exception):
    """A signal asked the run to stop; what was done is saved."""


class StopFlag:
    """Set by the first Ctrl-C or SIGTERM, looked at between steps; the second ends the program at once."""

    def __init__(self):
        self.raised = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._receive)

    def _receive(self, number, stack):
        if self.raised:
            sys.exit(128 + number)
        self.raised = True

    def check(self) -> None:
        if self.raised:
            raise StoppedError


class AveragedWeights:
    """An exponential moving average of a network's weights, whose decay rises over the first steps."""

    def __init__(self, net: nn.Module, decay: float, ramp: int):
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self.decay, self.ramp = decay, ramp

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        decay = self.decay * (1 - math.exp(-step / self.ramp)) if self.ramp else self.decay
        ours, theirs = list(self.net.parameters()), list(net.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        for buffer, current in zip(self.net.buffers(), net.buffers(), strict=True):
            buffer.copy_(current)


def choose_precision(name: str, device: torch.device):
    """A function that opens an autocast context."""
    if name == "auto":
        name = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    kind = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    return partial(torch.autocast, device.type, dtype=kind or torch.bfloat16, enabled=kind is not None)


def open_run(folder: Path, config: Config, resume: bool) -> None:
    """Make the run folder, or check that the one to resume was begun with this config. ValueError says what to do."""
    path = folder / "config.yaml"
    if not path.is_file():
        save_config(config, path)
        return
    if not resume:
        raise ValueError(f"{folder} holds a run already: go on with it by --resume, or name another folder by --run")
    before, now = yaml.safe_load(path.read_text()), config_to_dict(config)
    differing = sorted(_find_differences(before, now))
    if differing:
        raise ValueError(f"{folder} was begun with another config, so it cannot be resumed: {'; '.join(differing)}")


_FREE_KEYS = {"data.workers", "train.device", "train.keep_checkpoints", "log"}  # they do not change what is computed


def _find_differences(before: object, now: object, key: str = "") -> list[str]:
    if key in _FREE_KEYS or before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        names = {*before, *now}
        return [
            difference
            for name in names
            for difference in _find_differences(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [f"{key} was {before}, now {now}"]


def flatten_scores(scores: Scores) -> dict[str, float]:
    """Headlines and skills by name, for the log; what is not defined is left out."""
    values = {f"{name}/{score['headline']}": score["score"] for name, score in scores.items()}
    values |= {f"{name}/skill": score["skill"] for name, score in scores.items()}
    values["skill"] = mean_skill(scores)
    return {name: value for name, value in values.items() if value is not None}


def train(config: Config, folder: Path, resume: bool) -> None:
    """The whole run, from the config to the best weights; StoppedError after a signal."""
    stop = StopFlag()

    # ---- device and randomness
    device = pick_device(config.train.device)
    torch.manual_seed(config.seed)
    if config.deterministic:
        torch.use_deterministic_algorithms(True, warn_only=config.deterministic == "warn")
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs much, and nothing here reads such memory
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    autocast = choose_precision(config.train.precision, device)

    # ---- frames and tasks
    tasks = build_tasks(config.tasks)
    check_fit(config.model, tasks)  # a mistake in the config is told before anything is read
    split = read_split(config.data)
    data = load_data(split, limit=config.data.limit)
    frames = data.parts["train"]
    if not frames:
        raise ValueError(f"split {split.name!r} has no training frames in {', '.join(split.roots)}")
    has_label = {name: [task.has_label(frame) for frame in frames] for name, task in tasks.items()}
    assignment = assign_labels(has_label, config.data.labels, config.seed)
    if bare := [name for name, indices in assignment.items() if not indices]:
        raise ValueError(
            f"no training frame has a label for {', '.join(bare)} (data.labels={config.data.labels}): run the "
            f"preprocessing scripts, or leave tasks out (tasks.{bare[0]}=null)"
        )
    fit_tasks(tasks, frames)
    size = config.model.input_size or data.size

    # ---- network and its update
    net = build_network(config.model, tasks, size).to(device, memory_format=memory_format)
    averaged = None if config.train.ema is None else AveragedWeights(net, **config.train.ema.model_dump())
    backward = partial(backward_cycle, net, tasks=tasks, device=device, autocast=autocast, memory_format=memory_format)
    update = UPDATES[config.train.update](net, config.train, backward)
    balance = LossWeights(list(tasks), config.balancing.weights, config.balancing.normalise)
    progress = {"step": 0, "best_skill": None, "evaluated": True}

    # ---- resume
    open_run(folder, config, resume)
    log = RunLog(
        folder, config.log.tensorboard, config.log.wandb.model_dump() if config.log.wandb is not None else None
    )
    loaded = load_newest_checkpoint(folder / "checkpoints") if resume else None
    if loaded is not None:
        _, state = loaded
        net.load_state_dict(state["net"])
        update.load_state_dict(state["update"])
        balance.load_state_dict(state["balance"])
        if averaged is not None:
            averaged.net.load_state_dict(state["averaged"])
        progress = state["progress"]
        log.truncate_after(progress["step"])
    else:
        write_environment(folder, sys.argv)

    judged = averaged.net if averaged is not None else net
    header = {
        **describe_model(config, tasks, size, data, split),
        "assignment": hash_assignment(frames, assignment),
    }

    def save() -> None:
        state = {
            "net": net.state_dict(),
            "averaged": None if averaged is None else averaged.net.state_dict(),
            "update": update.state_dict(),
            "balance": balance.state_dict(),
            "progress": progress,
        }
        save_checkpoint(folder / "checkpoints", progress["step"], state, config.train.keep_checkpoints)

    def judge() -> None:
        """Once in a while: score on validation frames and keep the best weights."""
        judged_frames = data.parts["val"][: config.evaluate.limit]
        scores = {}
        if judged_frames:
            scores = evaluate(
                judged, tasks, judged_frames, data, size, device, config.evaluate.micro_batch,
                min(config.data.workers, 2), stop.check,
            )  # fmt: skip
            log.event("evaluate", progress["step"], **flatten_scores(scores))
        skill = mean_skill(scores)
        best = progress["best_skill"]
        # without anything to score on, the last weights are the best there are
        if skill is None or best is None or skill > best:
            progress["best_skill"] = skill
            save_weights(folder / "best.safetensors", judged.state_dict(), header | {"step": progress["step"]})
            write_json(folder / "best.json", {"step": progress["step"], "skill": skill, "scores": scores})
            if scores:
                tqdm.write(format_table({folder.name: scores}))
        progress["evaluated"] = True

    if not data.parts["val"]:
        tqdm.write(f"warning: split {split.name!r} has no validation frames here; the last weights are kept")
    describe_start(net, tasks, assignment, frames, data, device)

    # ---- the loop
    sampler = CycleSampler(
        assignment,
        config.data.labels,
        config.train.micro_batch,
        config.train.cycle,
        config.seed,
        progress["step"],
        config.train.steps,
    )
    augmentation = Augmentation(**config.data.augment.model_dump())
    dataset = FrameDataset(frames, data.roots, tasks, size, augmentation)
    loader = DataLoader(
        dataset,
        batch_sampler=sampler,
        num_workers=config.data.workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if config.data.workers else None,
    )
    batches = iter(loader)
    try:
        if not progress["evaluated"]:
            judge()
        bar = tqdm(range(progress["step"], config.train.steps), initial=progress["step"], total=config.train.steps)
        for step in bar:
            stop.check()
            cycle = [next(batches) for _ in range(sampler.batches_per_step)]

            net.train()
            losses, measures = update.step(step, cycle, balance.weights())
            balance.observe(losses)
            progress["step"] = step + 1
            if averaged is not None:
                averaged.update(net, step + 1)

            # once in a while: log, evaluate, save
            last = step + 1 == config.train.steps
            if (step + 1) % config.train.log_every == 0 or last:
                values = {f"loss/{name}": loss for name, loss in losses.items()}
                log.event("train", step + 1, **values, **measures)
            if (step + 1) % config.train.evaluate_every == 0 or last:
                progress["evaluated"] = False
                judge()
            if (step + 1) % config.train.save_every == 0 or last:
                save()
    except StoppedError:
        save()
        raise
    except NonFiniteError as error:
        raise NonFiniteError(f"step {progress['step'] + 1}: {error}; the weights are those before it") from error
    finally:
        log.close()


def describe_model(config: Config, tasks: dict[str, Task], size: tuple[int, int], data: Data, split: Split) -> dict:
    """What a weights file must say so that it can be used without the config."""
    return {
        "model": config.model.model_dump(mode="json"),
        "tasks": {name: task.options.model_dump(mode="json") for name, task in tasks.items()},
        "fitted": {name: task.fitted for name, task in tasks.items()},
        "input_size": list(size),
        "cameras": {
            str(path): {view: matrix.tolist() for view, matrix in root.cameras.items()}
            for path, root in data.roots.items()
        },
        "split": dataclasses.asdict(split),
    }


def describe_start(net: nn.Module, tasks: dict, assignment: dict, frames: list, data: Data, device) -> None:
    """Say what is about to be trained on what."""
    parameters = sum(parameter.numel() for parameter in net.parameters())
    labels = ", ".join(f"{name} {len(indices)}" for name, indices in assignment.items())
    sizes = ", ".join(f"{part} {len(members)}" for part, members in data.parts.items())
    tqdm.write(f"{parameters / 1e6:.1f} M parameters on {device}; frames: {sizes}; training labels: {labels}")


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
