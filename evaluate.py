"""Score runs and predictions: one table of metrics, each primary metric beside that of the constant baseline.

    python evaluate.py runs/demo [runs/other predictions/third ...] [--split val] [--data Datasets/processed/1024x640]
    python evaluate.py runs/symmetric --baseline runs/depth runs/steering [--format latex] [--report report.html]

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
from collections.abc import Callable, Collection, Iterable, Mapping
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
FORMATS = ["text", "json", "markdown", "latex", "csv"]
SCORING = [(task, field) for task, options in OPTIONS.items() for field in options.Protocol.model_fields]


def name_flag(task: str, field: str) -> str:
    """The flag of a field of a task's protocol: --cap, or --detection-classes where other tasks have the field, too."""
    alone = sum(name == field for _, name in SCORING) == 1
    return "--" + (field if alone else f"{task}_{field}").replace("_", "-")


def read_arguments() -> argparse.Namespace:
    allow_any_text()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="run folders, weights files or folders of predictions")
    parser.add_argument(
        "--baseline",
        nargs="+",
        type=Path,
        default=[],
        metavar="RUN",
        help="runs, such as those of single tasks, that the others are compared with: Delta-m and skills",
    )
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
    parser.add_argument(
        "--draws",
        type=count_or_none,
        default=1000,
        help="draws of the bootstrap that gives the 95%% intervals; 0: no intervals (default: 1000)",
    )
    parser.add_argument("--cost", action="store_true", help="also measure parameters, operations and time of networks")
    parser.add_argument("--format", choices=FORMATS, default="text", help="of what is printed (default: text)")
    parser.add_argument("--details", action="store_true", help="print all metrics, not only the primary ones")
    parser.add_argument("--output", type=Path, help="also write everything to this JSON file")
    parser.add_argument("--report", type=Path, help="also write a page with plots and pictures to this HTML file")
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

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from a2d2.dataset import DatasetError
from a2d2.frames import VIEWS, Frame
from experiment import (
    Data,
    Predicted,
    Source,
    Trained,
    WrongUseError,
    add_source,
    index_data,
    load_data,
    pick_device,
)
from scoring.bootstrap import FEW_BLOCKS, Blocks, draw_counts, find_blocks, find_interval, read_times
from scoring.compare import (
    TaskResult,
    average_groups,
    average_skills,
    compare_pairs,
    compare_with_baseline,
    find_groups,
    share_constants,
    summarise_seeds,
)
from scoring.cost import measure_cost
from scoring.predictors import NetPredictor, Predictor, make_predictor
from scoring.table import format_details, format_results, format_table
from tasks.task import Metrics, Task
from training.cycle import move
from training.distributed import Ranks
from training.files import make_json_ready, write_json
from training.loading import WorkerError, explain_memory, explain_worker_death, load_batches

Scores = dict[str, dict[str, Any]]


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
    predictor = NetPredictor(net, tasks, size, device, autocast)
    scored = score_frames(
        predictor, tasks, frames, data, device, micro_batch, workers, check_stop, protocol, labels, ranks
    )
    return {name: part.summarise() for name, part in scored.items()}


@dataclass
class Scored:
    """Of one task: the metrics of the predictions and of the constant baseline, None where that is not known, and the
    names of the scored frames."""

    task: Task
    metrics: Metrics
    baseline: Metrics | None
    frames: list[str] = dataclass_field(default_factory=list)

    def merge(self, other: "Scored") -> None:
        self.metrics.merge(other.metrics)
        if self.baseline is not None:
            self.baseline.merge(other.baseline)
        self.frames += other.frames

    def summarise(self) -> dict[str, Any]:
        """The row of a table, see `evaluate`."""
        baseline = None if self.baseline is None else self.baseline.compute()
        return _summarise(self.task, self.metrics.compute(), baseline, self.frames)

    def resample(self, counts: np.ndarray, place: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """The primary metric of the predictions and of the baseline in each draw; `place`: of each frame its column."""
        own = counts[:, [place[frame] for frame in self.frames]]
        nothing = np.full(len(counts), np.nan)
        return self.metrics.resample(own), nothing if self.baseline is None else self.baseline.resample(own)


@torch.no_grad()
def score_frames(
    predictor: Predictor,
    tasks: Mapping[str, Task],
    frames: list[Frame],
    data: Data,
    device: torch.device,
    micro_batch: int,
    workers: int,
    check_stop: Callable[[], None],
    protocol: Protocol,
    labels: Mapping[str, Collection[Frame]] | None = None,
    ranks: Ranks | None = None,
) -> dict[str, Scored]:
    """Score predictions on the labelled frames, see `evaluate`."""
    ranks = ranks or Ranks()
    scored_size = protocol.size or data.size
    batches = -(-len(frames) // micro_batch)
    first, last = (batches * rank // ranks.world * micro_batch for rank in (ranks.rank, ranks.rank + 1))
    scorers = {name: task.for_protocol(getattr(protocol, name)) for name, task in tasks.items()}
    parts = {}
    for name, scorer in scorers.items():
        known = scorer.label_statistics.get("constant") is not None
        metrics = [scorer.metrics(getattr(protocol, name)) for _ in range(2)]
        parts[name] = Scored(scorer, metrics[0], metrics[1] if known else None)
    problem: Exception | None = None
    try:
        dataset = predictor.load(frames[first:last], data.roots, scorers, scored_size, labels)
        total = -(-len(dataset) // micro_batch)
        with closing(load_batches(dataset, workers, device, batch_size=micro_batch)) as loaded:
            for batch in tqdm(loaded, "evaluate", total, leave=False, unit="batch", disable=not ranks.first):
                check_stop()
                if batch["rows"]:
                    _score_batch(predictor, batch, parts, scored_size, device)
    except (StoppedError, OSError, ValueError, WorkerError) as error:
        problem = error
    ranks.agree([], problem)
    parts, *others = ranks.gather(parts)
    for other in others:
        for name in tasks:
            parts[name].merge(other[name])
    return parts


def _score_batch(
    predictor: Predictor, batch: Mapping[str, Any], parts: Mapping[str, Scored], size: tuple[int, int], device: Any
) -> None:
    predictions = predictor.predict(batch, {name: part.task for name, part in parts.items()}, size)
    for name, prediction in predictions.items():
        part, target = parts[name], move(batch["targets"][name], device)
        part.metrics.update(move(prediction, device), target)
        if part.baseline is not None:
            part.baseline.update(part.task.predict_constant(target), target)
        part.frames += [batch["frame"][row] for row in batch["rows"][name].tolist()]


def _summarise(
    task: Task, metrics: dict[str, Any], baseline: dict[str, Any] | None, frames: list[str]
) -> dict[str, Any]:
    score = metrics[task.primary_metric]
    constant = None if baseline is None else baseline[task.primary_metric]
    # a constant baseline that predicts nothing has the worst score
    if baseline is not None and constant is None and score is not None and task.better == "higher":
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
        "baseline_metrics": baseline or {},
        "scored_frames": frames,
    }


def mean_skill(scores: Scores) -> float | None:
    """The mean skill over the tasks of a run, see average_skills; None if no task has one."""
    return average_skills(score["skill"] for score in scores.values())


def choose_protocol(runs: Mapping[str, Source], given: Mapping[str, Any]) -> Protocol:
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


def choose_frames(runs: Mapping[str, Source], subset: str, data: Data, unknown: bool) -> tuple[list[Frame], list[str]]:
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
        elif trained.split is None:
            members = set(available)
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


@dataclass
class Outcome:
    """What a run has come to: its `scores`, a row for each task; `results` of the tasks that could be scored, for
    comparisons; `details` of each task, for the report."""

    scores: Scores
    results: dict[str, TaskResult]
    details: dict[str, dict[str, Any]]
    cost: dict[str, Any] | None = None


@dataclass
class Draws:
    """The draws of the bootstrap: how often each frame counts in each, the column of each frame, and the blocks."""

    counts: np.ndarray
    place: dict[str, int]
    blocks: Blocks

    def describe(self) -> list[str]:
        """Notes on the intervals."""
        scenes, blocks = len(set(self.blocks.scene.tolist())), len(self.blocks.scene)
        notes = [
            f"95 % intervals: {len(self.counts)} draws of {scenes} scenes, then of blocks of 5 s or more in them "
            f"({blocks} in all); - where they have none"
        ]
        if blocks < FEW_BLOCKS:
            notes.append(f"{blocks} blocks are few: with less than {FEW_BLOCKS} an interval is too narrow")
        if self.blocks.untimed:
            notes.append(
                f"{len(self.blocks.untimed)} scenes are one block each, because frames.json beside their pictures "
                f"does not have all times: {', '.join(self.blocks.untimed[:3])}"
            )
        return notes


def draw_frames(frames: list[Frame], draws: int) -> Draws:
    blocks = find_blocks([frame.scene for frame in frames], read_times(frames))
    return Draws(draw_counts(blocks, draws), {str(frame): index for index, frame in enumerate(frames)}, blocks)


def evaluate_source(
    source: Source,
    frames: list[Frame],
    data: Data,
    protocol: Protocol,
    arguments: argparse.Namespace,
    draws: Draws | None = None,
) -> Outcome:
    """A run's scores; a task that cannot be scored by the protocol has a row that says why."""
    device = pick_device(arguments.device, "--device")
    conflicts = {task: _find_conflict(source, each, protocol) for task, each in source.tasks.items()}
    scored = {task: each for task, each in source.tasks.items() if not conflicts[task]}
    autocast = partial(torch.autocast, device.type, dtype=torch.bfloat16, enabled=arguments.precision == "bf16")
    predictor = make_predictor(source, device, autocast)
    source.check_frames(frames, data)
    cost = None
    if arguments.cost and isinstance(source, Trained):
        tasks, batch = list(source.tasks), arguments.micro_batch
        cost = vars(measure_cost(source.net, tasks, source.size, device, batch, autocast))
    parts = {}
    if scored:
        parts = score_frames(
            predictor, scored, frames, data, device, arguments.micro_batch, arguments.workers, lambda: None, protocol
        )
    if isinstance(source, Trained):
        source.net.cpu()
    outcome = Outcome({}, {}, {}, cost)
    for task, each in source.tasks.items():
        if task in parts:
            row = parts[task].summarise()
            result = TaskResult(parts[task].task, row["score"], row["constant"])
            if draws is not None and row["score"] is not None:
                result.draws, result.constant_draws = parts[task].resample(draws.counts, draws.place)
                row["interval"] = find_interval(result.draws)
            row["frame_scores"] = parts[task].metrics.score_frames()
            outcome.results[task] = result
            outcome.details[task] = parts[task].metrics.describe()
        else:
            row = _summarise(each, {each.primary_metric: None}, None, []) | {"conflict": conflicts[task]}
        outcome.scores[task] = row | {
            "subset": arguments.split,
            "step": source.header.get("step"),
            "weights": source.digest,
            "trained_frames": "recorded" if source.knows_frames else "unknown",
            "protocol": getattr(protocol, task).model_dump(mode="json") | {"size": list(protocol.size or data.size)},
            "precision": arguments.precision if isinstance(source, Trained) else source.header.get("precision"),
        }
    return outcome


def _find_conflict(source: Source, task: Task, protocol: Protocol) -> str | None:
    block = getattr(protocol, task.name)
    if isinstance(source, Predicted):
        return task.for_protocol(block).find_file_conflict(source.about[task.name])
    return task.find_conflict(block)


def load_sources(paths: list[Path]) -> tuple[dict[str, Source], dict[Path, str], list[str]]:
    """The runs that can be loaded, by their names; the name of each path; and what is wrong with the others."""
    runs: dict[str, Source] = {}
    names, errors = {}, []
    for path in dict.fromkeys(paths):
        try:
            names[path] = add_source(runs, path, torch.device("cpu"))
        except (OSError, ValueError) as error:
            errors.append(str(error))
    complete_statistics(runs.values())
    return runs, names, errors


def complete_statistics(sources: Iterable[Source]) -> None:
    """Give predictions of other programs, which come without a constant baseline, that of the first run with one."""
    known: dict[str, dict[str, Any]] = {}
    sources = list(sources)
    for source in sources:
        for name, task in source.tasks.items():
            if task.label_statistics.get("constant") is not None:
                known.setdefault(name, task)
    for source in sources:
        for name, task in source.tasks.items():
            if task.label_statistics.get("constant") is None and name in known:
                task.label_statistics = {
                    **task.label_statistics, "constant": known[name].translate_constant(task)
                }  # fmt: skip


def check_output(option: str, path: Path) -> None:
    """WrongUseError, before hours of scoring, for a path that cannot be a file."""
    if path.is_dir():
        raise WrongUseError(f"{option} {path} is a folder; name a file in it, such as {path / 'scores.json'}")
    parent = next((each for each in path.absolute().parents if each.exists()), Path("/"))
    if not parent.is_dir():
        raise WrongUseError(f"{option} {path}: {parent} is no folder")


@dataclass
class Evaluation:
    """Everything that an evaluation has found: of each run its outcome, the comparison of runs, notes and errors."""

    sources: dict[str, Source] = dataclass_field(default_factory=dict)
    outcomes: dict[str, Outcome] = dataclass_field(default_factory=dict)
    comparison: dict[str, Any] = dataclass_field(default_factory=dict)
    notes: list[str] = dataclass_field(default_factory=list)
    errors: list[str] = dataclass_field(default_factory=list)
    data: Data | None = None
    frames: list[Frame] = dataclass_field(default_factory=list)
    protocol: Protocol | None = None

    @property
    def scores(self) -> dict[str, Scores]:
        return {run: outcome.scores for run, outcome in self.outcomes.items()}

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it: `runs`: run -> task -> row; `costs`; `comparison`; `notes`."""
        costs = {run: outcome.cost for run, outcome in self.outcomes.items() if outcome.cost}
        return {"runs": self.scores, "costs": costs, "comparison": self.comparison, "notes": self.notes}


def evaluate_all(arguments: argparse.Namespace) -> Evaluation:
    """The scores of all runs; one that fails leaves the others alone."""
    pick_device(arguments.device, "--device")
    for option in ("output", "report"):
        if getattr(arguments, option):
            check_output(f"--{option}", getattr(arguments, option))
    given = read_protocol(arguments)
    runs, names, errors = load_sources([*arguments.runs, *arguments.baseline])
    for error in errors:
        print(f"evaluate: {error}", file=sys.stderr)
    done = Evaluation(sources=runs, errors=errors)
    if not runs:
        return done
    done.data = find_data(runs, arguments.data)
    done.protocol = choose_protocol(runs, given)
    frames, notes = choose_frames(runs, arguments.split, done.data, arguments.trained_frames == "unknown")
    done.frames = frames = frames[: arguments.limit]
    where = ", ".join(map(str, done.data.roots))
    if not frames:
        reasons = "".join(f"; {note}" for note in notes)
        raise ValueError(f"no {arguments.split} frames of {', '.join(runs)} in {where}{reasons}")
    draws = draw_frames(frames, arguments.draws) if arguments.draws else None
    for name, source in runs.items():
        try:
            done.outcomes[name] = evaluate_source(source, frames, done.data, done.protocol, arguments, draws)
        except (OSError, ValueError, RuntimeError, MemoryError) as error:
            memory = explain_memory(error) or explain_worker_death(error)
            if memory is None and isinstance(error, RuntimeError) and not isinstance(error, WorkerError):
                raise
            errors.append(f"{name}: {memory or error}")
            print(f"evaluate: {errors[-1]}", file=sys.stderr)
            continue
        if len(runs) > 1:  # they come one by one, and the last may be hours away
            tqdm.write(format_table({name: done.outcomes[name].scores}), file=sys.stderr)
        save(done, arguments)
    groups = find_groups({name: runs[name].recipe for name in done.outcomes})
    baselines = [names[path] for path in arguments.baseline if names.get(path) in done.outcomes]
    results = share_constants({name: outcome.results for name, outcome in done.outcomes.items()}, baselines)
    if results:
        done.comparison = {
            "groups": groups,
            "skills": average_groups(results, groups),
            "seeds": summarise_seeds(results, groups),
            "pairs": compare_pairs(results, groups),
            "baseline": compare_with_baseline(results, groups, baselines) if baselines else None,
        }
    tasks = dict.fromkeys(task for outcome in done.outcomes.values() for task in outcome.scores)
    steps = ", ".join(f"{name} of step {runs[name].header.get('step')}" for name in done.outcomes)
    done.notes = [
        f"{arguments.split}: {len(frames)} frames of {where}; weights: {steps}",
        f"protocol: {describe_protocol(done.protocol, tasks, done.data)}; precision {arguments.precision}",
        *(draws.describe() if draws else []),
        *notes,
    ]
    save(done, arguments)
    return done


def find_data(runs: Mapping[str, Source], given: str | None) -> Data:
    """The frames of the named dataset, else of that of the first run that has one."""
    splits = [source.split for source in runs.values() if source.split is not None]
    if given is None and not splits:
        raise WrongUseError("none of these says which dataset it is about: name it with --data")
    views = tuple(dict.fromkeys(view for split in splits for view in split.views)) or VIEWS
    try:
        return index_data([given] if given else list(splits[0].roots), views)
    except DatasetError as error:
        raise ValueError(f"{str(error).replace('data.roots', '--data')}") from error


def save(done: Evaluation, arguments: argparse.Namespace) -> None:
    if arguments.output:
        try:
            write_json(arguments.output, done.to_dict())
        except OSError as error:
            if str(error) not in done.errors:
                done.errors.append(str(error))
                print(f"evaluate: {error}", file=sys.stderr)


def main(arguments: argparse.Namespace | None = None) -> int:
    arguments = arguments or read_arguments()
    try:
        done = evaluate_all(arguments)
        if arguments.report and done.outcomes:
            from pictures.report import write_report

            size = write_report(arguments.report, done, pick_device(arguments.device, "--device"))
            print(f"report: {arguments.report}, {size / 1e6:.1f} MB", file=sys.stderr)
    except WrongUseError as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return WRONG_USE
    except (OSError, ValueError) as error:
        print(f"evaluate: {error}", file=sys.stderr)
        return ERROR
    if arguments.format == "json":
        print(json.dumps(make_json_ready(done.to_dict()), indent=2))
        print("\n".join(done.notes), file=sys.stderr)
    elif done.outcomes:
        costs = {run: outcome.cost for run, outcome in done.outcomes.items()}
        print(format_results(done.scores, done.comparison, costs, done.notes, arguments.format))
        if arguments.details:
            print(format_details(done.scores))
    return ERROR if done.errors else DONE


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
