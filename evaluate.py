"""Score runs: one table of metrics, each primary metric beside that of the constant baseline.

    python evaluate.py runs/demo [runs/other ...] [--split val] [--data Datasets/processed/1024x640]

All runs are scored on the same frames and by the same protocol, which is printed with the table. Labels are scored at
the size of the preprocessed dataset, unless the protocol says otherwise: a network with another input size gets a
resized image, and its prediction is mapped back.

The subsets are those that a run has recorded when it was started, not what a rule makes of the data today: a frame that
a run was trained on is never scored under another subset's name.
"""

import argparse
import contextlib
import json
import sys
from collections.abc import Callable, Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from a2d2.console import allow_any_text
from tasks.options import OPTIONS
from training.arguments import count, count_or_none
from training.config import Protocol, compose_protocol
from training.stopping import StoppedError, exit_on_interrupt

DONE, ERROR, WRONG_USE = 0, 1, 2
SCORING = [(task, field) for task, options in OPTIONS.items() for field in options.Protocol.model_fields]


def name_flag(task: str, field: str) -> str:
    """The flag of a field of a task's protocol: --cap, or --detection-classes where other tasks have the field, too."""
    alone = sum(name == field for _, name in SCORING) == 1
    return "--" + (field if alone else f"{task}_{field}").replace("_", "-")


def read_arguments() -> argparse.Namespace:
    allow_any_text()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders or weights files")
    parser.add_argument(
        "--split",
        choices=["train", "val", "test", "all"],
        default="val",
        help="subset to score on, as the runs have recorded it; all: every frame there is, trained on or not",
    )
    parser.add_argument("--data", help="preprocessed dataset to score on (default: that of the first run)")
    parser.add_argument(
        "--trained-frames",
        choices=["recorded", "unknown"],
        default="recorded",
        help="unknown: also score weights that do not say what they were trained on; their rows are marked",
    )
    parser.add_argument("--limit", type=count, help="score on the first so many frames only")
    protocol = parser.add_argument_group("protocol", "what is scored (default: evaluate.protocol of the runs' configs)")
    protocol.add_argument("--size", metavar="WxH", help="size in pixels at which labels are scored")
    for task, field in SCORING:
        described = OPTIONS[task].Protocol.model_fields[field].description
        protocol.add_argument(name_flag(task, field), dest=f"{task}.{field}", metavar="VALUE", help=described)
    parser.add_argument("--format", choices=["text", "json", "markdown"], default="text", help="of what is printed")
    parser.add_argument("--details", action="store_true", help="print all metrics, not only the primary ones")
    parser.add_argument("--output", type=Path, help="also write everything to this JSON file")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="of the network; bf16 is faster on a GPU, and rounds (default: fp32)",
    )
    parser.add_argument("--micro-batch", type=count, default=4, help="frames at a time")
    parser.add_argument("--workers", type=count_or_none, default=2, help="processes that load frames")
    return parser.parse_args()


if __name__ == "__main__":
    # before the slow imports, so that help and mistakes take no time and Ctrl-C no traceback
    exit_on_interrupt("evaluate")
    ARGUMENTS = read_arguments()

import torch
from torch import nn
from tqdm import tqdm

from a2d2.dataset import DatasetError, FrameDataset
from a2d2.frames import Frame
from experiment import Data, Trained, WrongUseError, index_data, load_data, load_trained, pick_device
from tasks.task import Metrics, Task
from training.cycle import move
from training.distributed import Ranks
from training.files import write_json
from training.loading import WorkerError, explain_memory, explain_worker_death, load_batches

Scores = dict[str, dict[str, Any]]


@torch.no_grad()
def evaluate(
    net: nn.Module,
    tasks: Mapping[str, Task],
    frames: list[Frame],
    data: Data,
    size: tuple[int, int],
    device: torch.device,
    micro_batch: int = 4,
    workers: int = 0,
    check_stop: Callable[[], None] = lambda: None,
    protocol: Protocol | None = None,
    labels: Mapping[str, Collection[Frame]] | None = None,
    ranks: Ranks | None = None,
    autocast: Callable = contextlib.nullcontext,
) -> Scores:
    """Score a network in evaluation mode on the labelled frames.

    `protocol`: what is scored, the `evaluate.protocol` block of a config. `labels`: task -> the frames whose label is
    used; by default those that have one. `check_stop` is called between batches and may raise. Of several `ranks` each
    scores some of the micro-batches that one would score, and all return the scores of all, to the last digit those of
    one. `autocast` opens a context of mixed precision.

    Returns for each task: `headline` (name of its primary metric), `score`, `constant` (the score of the constant
    baseline on the same labels), `skill`, `frames` (number of frames with a label), `scored_frames` (their names) and
    `metrics` (all of them); values are None if no frame has a label.
    """
    protocol = compose_protocol(OPTIONS)() if protocol is None else protocol
    ranks = ranks or Ranks()
    scored_size = protocol.size or data.size
    batches = -(-len(frames) // micro_batch)
    first, last = (batches * rank // ranks.world * micro_batch for rank in (ranks.rank, ranks.rank + 1))
    dataset = FrameDataset(frames[first:last], data.roots, tasks, size=size, target_size=scored_size, labels=labels)
    parts = {
        name: Scored(task.metrics(getattr(protocol, name)), task.metrics(getattr(protocol, name)))
        for name, task in tasks.items()
    }
    problem: Exception | None = None
    try:
        _score(net, tasks, dataset, parts, scored_size, device, micro_batch, workers, check_stop, ranks, autocast)
    except (StoppedError, OSError, ValueError, WorkerError) as error:
        problem = error
    ranks.agree([], problem)
    parts, *others = ranks.gather(parts)
    for other in others:
        for name in tasks:
            parts[name].merge(other[name])
    return {
        name: _summarise(task, parts[name].metrics.compute(), parts[name].baseline.compute(), parts[name].frames)
        for name, task in tasks.items()
    }


@dataclass
class Scored:
    """Of one task: the metrics of the predictions and of the constant baseline, and the names of the scored frames."""

    metrics: Metrics
    baseline: Metrics
    frames: list[str] = dataclass_field(default_factory=list)

    def merge(self, other: "Scored") -> None:
        self.metrics.merge(other.metrics)
        self.baseline.merge(other.baseline)
        self.frames += other.frames


def _score(
    net: nn.Module,
    tasks: Mapping[str, Task],
    dataset: FrameDataset,
    parts: Mapping[str, Scored],
    scored_size: tuple[int, int],
    device: torch.device,
    micro_batch: int,
    workers: int,
    check_stop: Callable[[], None],
    ranks: Ranks,
    autocast: Callable,
) -> None:
    """Add the predictions on all frames of a dataset to the parts."""
    net.eval()
    total = -(-len(dataset) // micro_batch)
    with closing(load_batches(dataset, workers, device, batch_size=micro_batch)) as batches:
        for batch in tqdm(batches, "evaluate", total, leave=False, unit="batch", disable=not ranks.first):
            check_stop()
            if not batch["rows"]:
                continue
            image = batch["image"].to(device, non_blocking=True)
            with autocast():
                outputs = net(image, move(batch["rows"], device))
            for name, output in outputs.items():
                target = move(batch["targets"][name], device)
                parts[name].metrics.update(tasks[name].predict(output, scored_size), target)
                parts[name].baseline.update(tasks[name].predict_constant(target), target)
                parts[name].frames += [batch["frame"][row] for row in batch["rows"][name].tolist()]


def _summarise(task: Task, metrics: dict[str, Any], baseline: dict[str, Any], frames: list[str]) -> dict[str, Any]:
    score, constant = metrics[task.primary_metric], baseline[task.primary_metric]
    # a constant baseline that predicts nothing has the worst score
    if constant is None and score is not None and task.better == "higher":
        constant = 0.0
    defined = score is not None and constant is not None
    return {
        "headline": task.primary_metric,
        "better": task.better,
        "unit": task.unit,
        "score": score,
        "constant": constant,
        "skill": task.skill(score, constant) if defined else None,
        "frames": len(frames),
        "metrics": metrics,
        "scored_frames": frames,
    }


def mean_skill(scores: Scores) -> float | None:
    """The mean skill over the tasks of a run; None if no task has one.

    A skill below -1, an error of more than twice the constant baseline's, counts as -1: a task has at most the share
    of one task in the choice of the best weights.
    """
    skills = [max(score["skill"], -1.0) for score in scores.values() if score["skill"] is not None]
    return sum(skills) / len(skills) if skills else None


def _list_skilled(scores: Scores) -> tuple[str, ...]:
    return tuple(task for task, score in scores.items() if score["skill"] is not None)


def _show(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def format_table(results: dict[str, Scores], markdown: bool = False) -> str:
    """One row for each run and task, then the mean skill of each run, then notes on what cannot be compared."""
    header = ["run", "task", "metric", "score", "constant", "skill", "frames"]
    lines, notes = [], []
    for run, scores in results.items():
        unknown = any(score.get("trained_frames") == "unknown" for score in scores.values())
        shown = f"{run}*" if unknown else run
        for task, score in scores.items():
            metric = f"{score['headline']} ({score['better']} is better{', ' if score['unit'] else ''}{score['unit']})"
            values = [_show(score[key]) for key in ("score", "constant", "skill")]
            lines.append([shown, task, metric, *values, str(score["frames"])])
            notes += _explain_row(run, task, score)
        skilled = _list_skilled(scores)
        named = f"mean skill of {len(skilled)} task{'s' * (len(skilled) != 1)}"
        lines.append([shown, "all", named, "", "", _show(mean_skill(scores)), ""])
        if unknown:
            notes.append(f"* {run}: it is unknown whether it was trained on these frames")
    if len({_list_skilled(scores) for scores in results.values()}) > 1:
        notes.append("the mean skills are over different tasks, so they cannot be compared")
    constants: dict[str, set[float]] = {}
    for task, score in ((task, score) for scores in results.values() for task, score in scores.items()):
        constants.setdefault(task, set()).update({score["constant"]} - {None})
    if differing := [task for task, values in constants.items() if len(values) > 1]:
        notes.append(
            f"{', '.join(differing)}: the runs have other constant baselines, found on other training labels or under "
            "another protocol, so compare their scores and not their skills"
        )
    widths = [max(len(row[column]) for row in [header, *lines]) for column in range(len(header))]
    rows = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *lines]]
    if markdown:
        rows.insert(1, ["-" * width for width in widths])
        text = ["| " + " | ".join(row) + " |" for row in rows]
    else:
        text = ["  ".join(row).rstrip() for row in rows]
    return "\n".join([*text, *([""] if markdown and notes else []), *notes])


def _explain_row(run: str, task: str, score: Mapping[str, Any]) -> list[str]:
    if score.get("conflict"):
        return [f"{run}, {task}: not scored, because {score['conflict']}"]
    if score["skill"] is None and score["score"] is not None and score["constant"] is not None:
        return [
            f"{run}, {task}: no skill, because the error of the constant baseline ({score['constant']:.4g}) is at or "
            "below the resolution of the labels"
        ]
    return []


def format_details(results: dict[str, Scores]) -> str:
    """All metrics, one a line."""
    return "\n".join(
        f"{run}  {task}  {name}  {_show(value)}"
        for run, scores in results.items()
        for task, score in scores.items()
        for name, value in score["metrics"].items()
    )


def choose_protocol(runs: Mapping[str, Trained], given: Mapping[str, Any]) -> Protocol:
    """The one protocol of a table: that of the runs' configs, with the given values in place of theirs.

    given: "size" or "task.field" -> value. WrongUseError where the runs differ and nothing is given, or for a value
    that is not allowed.
    """
    recorded: dict[str, dict[str, Any]] = {}
    for name, trained in runs.items():
        for key, value in trained.protocol.items():
            recorded.setdefault(key, {})[name] = value
    values: dict[str, Any] = {}
    for key in {*recorded, *given}:
        choices = recorded.get(key, {})
        if key not in given and len({json.dumps(value) for value in choices.values()}) > 1:
            listed = ", ".join(f"{value} of {name}" for name, value in choices.items())
            flag = name_flag(*key.split(".")) if "." in key else f"--{key}"
            raise WrongUseError(f"the runs were validated by different protocols, {key}: {listed}; choose with {flag}")
        value = given[key] if key in given else next(iter(choices.values()))
        block, _, field = key.rpartition(".")
        (values.setdefault(block, {}) if block else values)[field] = value
    try:
        protocol = compose_protocol(OPTIONS).model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        details = error.errors(include_url=False)[0]
        key = ".".join(map(str, details["loc"][:2]))
        flag = name_flag(*key.split(".")) if "." in key else f"--{key}"
        raise WrongUseError(
            f"{flag} {details['input']}: {details['msg'].removeprefix('Value error, ').replace('Input should', 'must')}"
        ) from error
    # what a protocol leaves to the run, the first that has the task decides
    tasks = {name: task for trained in reversed(runs.values()) for name, task in trained.tasks.items()}
    completed = {name: task.complete_protocol(getattr(protocol, name)) for name, task in tasks.items()}
    return protocol.model_copy(update=completed)


def read_protocol(arguments: argparse.Namespace) -> dict[str, Any]:
    """The given values of the protocol, by "size" or "task.field"."""
    given = {f"{task}.{field}": getattr(arguments, f"{task}.{field}") for task, field in SCORING}
    try:
        values = {key: yaml.safe_load(text) for key, text in given.items() if text is not None}
    except yaml.YAMLError as error:
        raise WrongUseError(f"a value of the protocol is no YAML: {str(error).splitlines()[0]}") from error
    if arguments.size is not None:
        width, _, height = arguments.size.lower().partition("x")
        if not (width.isdigit() and height.isdigit()):
            raise WrongUseError(f"--size {arguments.size}: must be WIDTHxHEIGHT, such as 1024x640")
        values["size"] = [int(width), int(height)]
    return values


def choose_frames(runs: Mapping[str, Trained], subset: str, data: Data, unknown: bool) -> tuple[list[Frame], list[str]]:
    """The frames that all runs are scored on, and notes on what was left out.

    Each run has its own subsets; the frames of a subset are those that are in it for all runs, and that none was
    trained on, unless `subset` is "train" or "all". WrongUseError for a run that does not say what it was trained on,
    unless that may be `unknown`.
    """
    where = ", ".join(map(str, data.roots))
    available = {str(frame): frame for frame in data.others}
    notes: list[str] = []
    chosen, trained_on, of_run = set(available), set(), {}
    for name, trained in runs.items():
        record = trained.record
        if subset in ("val", "test") and not unknown and not trained.knows_frames:
            raise WrongUseError(
                f"{name} does not say which frames it was trained on, so its {subset} frames may be among them: "
                "--trained-frames unknown scores it by the rule of its split, and marks it"
            )
        if subset == "all":
            members = set(available)
            if record is not None and (known := len(record.trained & members)):
                notes.append(f"{name} was trained on {known} of these frames")
        elif record is None:
            by_rule = load_data(trained.split, [str(root) for root in data.roots]).subsets[subset]
            members = {str(frame) for frame in by_rule}
        else:
            members = set(record.subsets[subset])
            if missing := len(members - set(available)):
                notes.append(f"{missing} of {len(members)} {subset} frames of {name} are not in {where}")
            if new := len(set(available) - {each for names in record.subsets.values() for each in names}):
                notes.append(f"{new} frames in {where} are in no subset of {name}: left out")
        if record is not None:
            trained_on |= record.trained
        of_run[name] = members & set(available)
        chosen &= members
    for name, members in of_run.items():
        if differing := len(members - chosen):
            notes.append(f"{differing} {subset} frames of {name} are not {subset} frames of all runs: left out")
    if subset in ("val", "test") and (used := chosen & trained_on):
        notes.append(f"{len(used)} frames are left out, because a run was trained on them")
        chosen -= used
    return sorted(available[name] for name in chosen), notes


def describe_protocol(protocol: Protocol, tasks: Collection[str], data: Data) -> str:
    """One line: what is scored."""
    width, height = protocol.size or data.size
    parts = [f"{width}x{height}"]
    for name in tasks:
        fields = {key: value for key, value in getattr(protocol, name) if value is not None}
        if fields:
            parts.append(f"{name} " + " ".join(f"{key}={value}" for key, value in fields.items()))
    return "; ".join(parts)


def evaluate_run(
    name: str, trained: Trained, frames: list[Frame], data: Data, protocol: Protocol, arguments: argparse.Namespace
) -> Scores:
    """A run's scores; a task that cannot be scored by the protocol has a row that says why."""
    device = pick_device(arguments.device, "--device")
    conflicts = {task: each.find_conflict(getattr(protocol, task)) for task, each in trained.tasks.items()}
    scored = {task: each for task, each in trained.tasks.items() if not conflicts[task]}
    net = trained.net.to(device, memory_format=torch.channels_last)
    autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=arguments.precision == "bf16")
    scores = (
        evaluate(
            net, scored, frames, data, trained.size, device, arguments.micro_batch, arguments.workers,
            protocol=protocol, autocast=autocast,
        )
        if scored
        else {}
    )  # fmt: skip
    trained.net.cpu()
    result = {}
    for task, each in trained.tasks.items():
        metrics = {each.primary_metric: None}
        row = scores.get(task) or _summarise(each, metrics, metrics, []) | {"conflict": conflicts[task]}
        result[task] = row | {
            "subset": arguments.split,
            "step": trained.header.get("step"),
            "trained_frames": "recorded" if trained.knows_frames else "unknown",
            "protocol": getattr(protocol, task).model_dump(mode="json") | {"size": list(protocol.size or data.size)},
            "precision": arguments.precision,
        }
    return result


def load_runs(paths: list[Path]) -> tuple[dict[str, Trained], list[str]]:
    """The runs that can be loaded, by their names, and what is wrong with the others."""
    runs, errors = {}, []
    for path in paths:
        try:
            trained = load_trained(path, torch.device("cpu"))
        except (OSError, ValueError) as error:
            errors.append(str(error))
            continue
        runs[trained.name if trained.name not in runs else str(path)] = trained
    return runs, errors


def check_output(path: Path) -> None:
    """WrongUseError, before hours of scoring, for a path that cannot be a file."""
    if path.is_dir():
        raise WrongUseError(f"--output {path} is a folder; name a file in it, such as {path / 'scores.json'}")
    parent = next((each for each in path.absolute().parents if each.exists()), Path("/"))
    if not parent.is_dir():
        raise WrongUseError(f"--output {path}: {parent} is no folder")


def evaluate_all(arguments: argparse.Namespace) -> tuple[dict[str, Scores], list[str], list[str]]:
    """The scores of all runs, notes on the table, and errors; a run that fails leaves the others alone."""
    pick_device(arguments.device, "--device")
    if arguments.output:
        check_output(arguments.output)
    given = read_protocol(arguments)
    runs, errors = load_runs(arguments.runs)
    for error in errors:
        print(f"evaluate: {error}", file=sys.stderr)
    if not runs:
        return {}, [], errors
    first = next(iter(runs.values()))
    views = tuple(dict.fromkeys(view for trained in runs.values() for view in trained.split.views))
    try:
        data = index_data([arguments.data] if arguments.data else list(first.split.roots), views)
    except DatasetError as error:
        raise ValueError(f"{str(error).replace('data.roots', '--data')}") from error
    protocol = choose_protocol(runs, given)
    frames, notes = choose_frames(runs, arguments.split, data, arguments.trained_frames == "unknown")
    frames = frames[: arguments.limit]
    if not frames:
        reasons = "".join(f"; {note}" for note in notes)
        raise ValueError(
            f"no {arguments.split} frames of {', '.join(runs)} in {', '.join(map(str, data.roots))}{reasons}"
        )
    results: dict[str, Scores] = {}
    for name, trained in runs.items():
        try:
            results[name] = evaluate_run(name, trained, frames, data, protocol, arguments)
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            memory = explain_memory(error) or explain_worker_death(error)
            if memory is None and isinstance(error, RuntimeError) and not isinstance(error, WorkerError):
                raise
            errors.append(f"{name}: {memory or error}")
            print(f"evaluate: {errors[-1]}", file=sys.stderr)
            continue
        if len(runs) > 1:  # they come one by one, and the last may be hours away
            tqdm.write(format_table({name: results[name]}), file=sys.stderr)
        if arguments.output:
            try:
                write_json(arguments.output, results)
            except OSError as error:
                errors.append(str(error))
                print(f"evaluate: {error}", file=sys.stderr)
    tasks = dict.fromkeys(task for scores in results.values() for task in scores)
    where = ", ".join(map(str, data.roots))
    steps = ", ".join(f"{name} of step {trained.header.get('step')}" for name, trained in runs.items())
    about = [
        f"{arguments.split}: {len(frames)} frames of {where}; weights: {steps}",
        f"protocol: {describe_protocol(protocol, tasks, data)}; precision {arguments.precision}",
    ]
    return results, [*about, *notes], errors


def main(arguments: argparse.Namespace | None = None) -> int:
    arguments = arguments or read_arguments()
    try:
        results, notes, errors = evaluate_all(arguments)
    except WrongUseError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return WRONG_USE
    except (OSError, ValueError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return ERROR
    if arguments.format == "json":
        print(json.dumps(results, indent=2))
        print("\n".join(notes), file=sys.stderr)
    elif results:
        markdown = arguments.format == "markdown"
        print(format_table(results, markdown))
        print("\n".join([""] * markdown + notes))
        if arguments.details:
            print(format_details(results))
    return ERROR if errors else DONE


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
