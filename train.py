"""Train one network on several tasks, from frames that carry labels for any subset of them.

    python train.py --config configs/demo.yaml [train.steps=100 ...] [--run runs/demo] [--resume]
    torchrun --nproc-per-node 2 -- train.py --config configs/demo.yaml --resume      # the same run on two GPUs

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
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from a2d2.dataset import Augmentation, FrameDataset, TeacherFiles, index_labels
from a2d2.frames import Frame
from evaluate import Scores, evaluate, format_table, mean_skill
from experiment import (
    Data,
    Split,
    WrongUseError,
    adopt_classes,
    build_network,
    build_tasks,
    check_fit,
    check_recorded_data,
    collect_label_statistics,
    find_ancestors,
    find_labels,
    find_teacher_files,
    initialise,
    load_data,
    load_recorded_data,
    note_annotated,
    pick_device,
    read_split,
)
from tasks import TASKS
from tasks.task import Task
from training.balancing import Balancer, NonFiniteError, Normaliser
from training.config import DEALT, MICRO_BATCH, Ramp, name_regime
from training.cycle import Cycle, CycleBackward, count_labels
from training.distributed import RankError, Ranks, join_ranks
from training.ema import EmaWeights
from training.loading import WorkerError, explain_memory, explain_worker_death, load_batches, send_ahead
from training.parts import check_ranks, compile_parts, freeze_parts, recompute_neck, start_training
from training.record import Record, are_same_pseudo
from training.run import Run, RunState
from training.sampling import (
    CycleSampler,
    Stream,
    Teaching,
    assign_labels,
    build_streams,
    draw_budget,
    find_repeat_factors,
    hash_assignment,
    hold_out,
    parse_assignment,
    read_assignment,
    write_assignment,
)
from training.teacher import MeanTeacher
from training.updates import AsyncUpdate, CycleUpdate, SoftCounts, Update


@dataclass
class Setup:
    """What a run trains on. `frames`: those of the training subset; `assignment`: task -> which of them, by index, have
    a label of it that is used; `labels`: task -> all frames whose label of it may be used; `size`: (width, height) of
    the network's input; `teachers`: the pseudo-labels, if there are any."""

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
    ranks: Ranks
    teachers: TeacherFiles | None = None

    def write_assignment(self) -> str:
        """The text of assignment.json."""
        held_out = {}
        if self.config.data.hold_out:
            _, held_out = assign_training_labels(self.config, self.frames, self.labels)
        return write_assignment(self.frames, self.assignment, held_out)

    def build_streams(self) -> list[Stream]:
        """The streams of frames that training draws from."""
        micro_batch = self.config.train.micro_batch
        if isinstance(micro_batch, dict):
            micro_batch = {name: micro_batch.get(name, MICRO_BATCH) for name in self.tasks}
        active = {
            name: (task.options.train.from_step, task.options.train.until_step) for name, task in self.tasks.items()
        }
        numbers = micro_batch.values() if isinstance(micro_batch, dict) else [micro_batch]
        pseudo = self.config.data.pseudo
        return build_streams(
            self.assignment, name_regime(self.config.data.labels), micro_batch, active, self.record.repeat_factors,
            self._find_unlabelled(), (pseudo.micro_batch if pseudo else None) or max(numbers),
        )  # fmt: skip

    @property
    def ramp(self) -> Ramp | None:
        """When teachers are heard, and how much what they say counts; None if there are none."""
        return self.config.data.pseudo or self.config.train.mean_teacher

    @property
    def taught(self) -> dict[str, frozenset[Frame]] | None:
        """Task -> the frames about which the mean teacher is asked: those whose true label is not used."""
        if self.config.train.mean_teacher is None:
            return None
        return {
            name: frozenset(self.frames).difference(self.frames[index] for index in indices)
            for name, indices in self.assignment.items()
        }

    def _find_unlabelled(self) -> list[int]:
        """The frames about which teachers say something."""
        about: Mapping[str, Collection[Frame]] = self.teachers.frames if self.teachers else self.taught or {}
        known = set().union(*about.values())
        return [index for index, frame in enumerate(self.frames) if frame in known]

    def build_sampler(self, first_step: int) -> CycleSampler:
        """This rank's micro-batches from `first_step` to the last."""
        options = self.config.train
        return CycleSampler(
            self.build_streams(), options.cycle, self.config.seed, first_step, options.steps, options.merge,
            self.ranks.rank, self.ranks.world, Teaching(tuple(self.tasks), self.ramp.steps) if self.ramp else None,
        )  # fmt: skip


def check_start(config: Config, device: torch.device, ranks: Ranks) -> None:
    """WrongUseError for what cannot run on this device or these ranks."""
    if config.train.precision == "fp16" and device.type == "cpu":
        raise WrongUseError("train.precision=fp16 is for a GPU; take fp32 or bf16 on the CPU")
    if not ranks.alone and config.train.update == "async":
        raise WrongUseError(
            "train.update=async is for one process: each group steps when it has counted enough samples, one after the "
            "other; train without torchrun, or take train.update=cycle"
        )
    if not ranks.alone and device.type == "cuda" and torch.cuda.device_count() <= ranks.local:
        raise WrongUseError(
            f"rank {ranks.rank} has no GPU of its own: this machine has {torch.cuda.device_count()}; start as many "
            "ranks as GPUs, or take train.device=cpu"
        )


def prepare(config: Config, record: Record | None = None, kept: str | None = None, ranks: Ranks | None = None) -> Setup:
    """Config -> tasks, frames, labels; the tasks hold their label statistics. ValueError says what is missing.

    With the record of a run that is resumed, frames, labels and statistics are those it started with; `kept`: the text
    of its assignment.json, if that is there.
    """
    ranks = ranks or Ranks()
    device = pick_rank_device(config, ranks)
    check_start(config, device, ranks)
    tasks = build_tasks(config.tasks, record and dict(record.label_statistics))
    check_fit(config.model, tasks)  # mistakes in the config are reported before any file is read
    split = read_split(config.data)
    fresh = record is None
    if record is None:
        data = load_data(split, limit=config.data.limit)
        tasks = adopt_classes(tasks, data)
        labels = find_labels(tasks, data, split.views)
        record, assignment = start_record(config, tasks, data, labels)
    else:
        data = load_recorded_data(record, split)
        tasks = adopt_classes(tasks, data)
        labels = find_labels(tasks, data, split.views)
        notes = check_recorded_data(record, data, labels, [task.kind for task in tasks.values()])
        for note in notes if ranks.first else ():
            tqdm.write(note)
        by_name = {str(frame): frame for members in data.subsets.values() for frame in members}
        labels = {
            name: frozenset(by_name[frame] for frame in record.labels[name] if frame in by_name) for name in tasks
        }
        frames = data.subsets["train"]
        assignment = read_kept_assignment(kept, frames) or assign_training_labels(config, frames, labels)[0]
    frames = data.subsets["train"]
    if hash_assignment(frames, assignment) != record.assignment:
        raise ValueError(
            "the labels that this run was trained on are assigned to tasks in another way now, so its assignment.json, "
            "the file it came from, or the code has changed: put that back, or start another run with --run"
        )
    size = config.model.input_size or data.size
    teachers = None
    if fresh:
        check_learning(config, tasks, frames, labels, assignment)
    if config.data.pseudo is not None:
        teachers, pseudo = find_teacher_files(config.data.pseudo.roots, tasks, data, assignment, size)
        if fresh:
            record = replace(record, pseudo=pseudo)
        elif not are_same_pseudo(record.pseudo, pseudo):
            raise ValueError(
                f"the pseudo-labels in {', '.join(config.data.pseudo.roots)} are not those this run started with: "
                "bring those back, or start another run with --run"
            )
    setup = Setup(config, device, tasks, split, data, record, frames, labels, assignment, size, ranks, teachers)
    fewest = setup.build_sampler(0).find_fewest()
    if fewest == 0:
        raise WrongUseError(
            "there are steps in which no task is trained: see from_step and until_step of tasks.*.train"
        )
    if fewest < ranks.world:
        raise WrongUseError(
            f"{ranks.world} ranks share steps of {fewest} micro-batches, so some would have nothing to do: raise "
            f"train.cycle to {-(-ranks.world * config.train.cycle // fewest)} or more (with a smaller "
            "train.micro_batch the step has as many frames as before), or start fewer ranks"
        )
    return setup


def pick_rank_device(config: Config, ranks: Ranks) -> torch.device:
    """The device of the config; of several ranks on a machine each has the GPU of its number."""
    device = pick_device(config.train.device)
    return torch.device("cuda", ranks.local) if device.type == "cuda" and not ranks.alone else device


def read_kept_assignment(text: str | None, frames: list[Frame]) -> dict[str, list[int]] | None:
    """The assignment of a run that is resumed; None if its file is not there or not as it was written."""
    position = {str(frame): index for index, frame in enumerate(frames)}
    try:
        return {name: [position[frame] for frame in members] for name, members in parse_assignment(text or "").items()}
    except (ValueError, KeyError):
        return None


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
    assignment, _ = assign_training_labels(config, frames, labels)
    check_labels(config, frames, labels, assignment)
    having = {name: [frames[index] for index in indices] for name, indices in assignment.items()}
    collect_label_statistics(tasks, having, config.evaluate.protocol, data.roots)
    note_annotated(tasks, having, data)
    everywhere = [frame for members in data.subsets.values() for frame in members]
    factors = compute_repeat_factors(config, tasks, frames, assignment)
    record = Record(
        {subset: tuple(map(str, members)) for subset, members in data.subsets.items()},
        {name: tuple(str(frame) for frame in everywhere if frame in found) for name, found in labels.items()},
        {name: task.label_statistics for name, task in tasks.items()},
        hash_assignment(frames, assignment),
        data.find_identity([task.kind for task in tasks.values()]),
        inherited,
        factors,
    )
    return record, assignment


def compute_repeat_factors(
    config: Config, tasks: dict[str, Task], frames: list[Frame], assignment: dict[str, list[int]]
) -> dict[str, list[float]]:
    """Task -> how often its frames are drawn in comparison, of the tasks that draw rare frames more often.

    All their labels are read. WrongUseError under a regime in which tasks have no streams of their own.
    """
    wanted = {name: below for name, task in tasks.items() if (below := getattr(task.options, "oversample_below", None))}
    if wanted and name_regime(config.data.labels) == "symmetric":
        raise WrongUseError(
            f"tasks.{next(iter(wanted))}.oversample_below needs a stream of its own, and under data.labels=symmetric "
            "all tasks share one: take another regime"
        )
    factors = {}
    for name, below in wanted.items():
        indices = tqdm(assignment[name], desc=f"read the labels of {name}", leave=False, unit="label")
        categories = [tasks[name].list_categories(tasks[name].load(frames[index])) for index in indices]
        factors[name] = [round(factor, 6) for factor in find_repeat_factors(categories, below)]
    return factors


def assign_training_labels(
    config: Config, frames: list[Frame], labels: dict[str, frozenset[Frame]]
) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    """Task -> the training frames, by index, whose label of it the regime uses, and those whose it holds out."""
    has_label = {name: [frame in found for frame in frames] for name, found in labels.items()}
    chosen, seed = config.data.labels, config.data.labels_seed
    if isinstance(chosen, str):
        assignment = assign_labels(has_label, chosen, seed)
    elif (regime := name_regime(chosen)) in DEALT:
        # in the order of all tasks, so that runs of other tasks have the same labels
        dealt = [name for name in TASKS if name in chosen[regime]]
        if unknown := [name for name in chosen[regime] if name not in TASKS]:
            raise WrongUseError(f"data.labels: there is no task {unknown[0]}; there are {', '.join(TASKS)}")
        views = {frame.view for frame in frames}
        for name in dealt:
            if name not in has_label:
                found = index_labels(frames, TASKS[name].kind, views)
                has_label[name] = [frame in found for frame in frames]
        everyone = assign_labels({name: has_label[name] for name in dealt}, regime, seed)
        assignment = {name: everyone[name] for name in labels}
    elif "file" in chosen:
        assignment = read_assignment(Path(chosen["file"]), frames, has_label)
    else:
        assignment = draw_budget(frames, has_label, chosen["budget"], seed)
    return hold_out(frames, assignment, config.data.hold_out, seed)


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


def check_learning(
    config: Config,
    tasks: dict[str, Task],
    frames: list[Frame],
    labels: dict[str, frozenset[Frame]],
    assignment: dict[str, list[int]],
) -> None:
    """WrongUseError if a task cannot learn from teachers as the config asks for, if an online teacher would be asked
    about nothing, or if nothing is held out of labels that are to be."""
    online = config.train.mean_teacher is not None
    if online or config.data.pseudo is not None:
        for task in tasks.values():
            if conflict := task.find_pseudo_conflict(online):
                raise WrongUseError(conflict)
    if online and all(len(indices) == len(frames) for indices in assignment.values()):
        raise WrongUseError(
            "train.mean_teacher has nothing to say: the true label of every task is used on every training frame; "
            "leave it out, or give fewer labels (data.labels)"
        )
    held_out = assign_training_labels(config, frames, labels)[1] if config.data.hold_out else {}
    if empty := [name for name, indices in held_out.items() if not indices]:
        raise WrongUseError(
            f"data.hold_out={config.data.hold_out} holds out no label of {empty[0]}: whole scenes are held out, and "
            f"its {len(assignment[empty[0]])} labels are of one scene; leave it out, or train on more scenes"
        )


def build_state(setup: Setup, load_pretrained: bool = True) -> RunState:
    """The network, its EMA, its optimizers and its balancing, as they are before the first step.

    Without `load_pretrained` the weights are those of no file, because a checkpoint follows."""
    config, device = setup.config, setup.device
    memory_format = torch.channels_last if config.train.channels_last else torch.contiguous_format
    balance = build_balancer(config, setup.tasks)
    # the first rank's weights are sent to the others, so that each is not asked for the file
    net = build_network(config.model, setup.tasks, setup.size, load_pretrained and setup.ranks.first)
    if config.train.init is not None and load_pretrained:
        notes = initialise(net, config.train.init)
        for note in notes if setup.ranks.first else ():
            tqdm.write(note)
    net = net.to(device, torch.float64 if config.train.precision == "fp64" else None, memory_format=memory_format)
    setup.ranks.copy_from_first([*net.parameters(), *net.buffers()])
    try:
        freeze_parts(net, config.train.freeze)
        check_ranks(net, setup.ranks.world)
        if config.train.recompute:
            recompute_neck(net)
    except ValueError as error:
        raise WrongUseError(str(error)) from error
    ema = None if config.train.ema is None else EmaWeights(net, **config.train.ema.model_dump())
    if config.train.compile:
        compile_parts(net)
    autocast = choose_autocast(config.train.precision, device)
    update = build_update(config, net, setup.tasks, device, autocast, memory_format, setup.ranks, balance)
    return RunState(net, ema, update, balance, update.normaliser)


def build_update(
    config: Config,
    net: torch.nn.Module,
    tasks: dict[str, Task],
    device: torch.device,
    autocast: Callable,
    memory_format: torch.memory_format,
    ranks: Ranks | None = None,
    balance: Balancer | None = None,
) -> Update:
    """What turns cycles into new weights of `net`, by the config's train and balancing blocks."""
    balance = balance or build_balancer(config, tasks)
    backward = CycleBackward(net, tasks, device, autocast, memory_format, ranks)
    if config.train.update == "async":
        return AsyncUpdate(net, config.train, backward, balance, Normaliser(tasks))
    return CycleUpdate(net, config.train, backward, balance, Normaliser(tasks), config.balancing.rows)


def build_balancer(config: Config, tasks: dict[str, Task]) -> Balancer:
    """The config's way of balancing; WrongUseError if its solver is not installed."""
    try:
        return Balancer(list(tasks), config.balancing, config.seed)
    except ImportError as error:
        raise WrongUseError(
            f"balancing.method={config.balancing.method} needs packages that are not installed: {error} (their "
            "licences: docs/training.md), or take another method"
        ) from error


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
    dtype = {"fp32": None, "fp64": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return partial(torch.autocast, device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def load_cycles(setup: Setup, first_step: int) -> Generator[Cycle, None, None]:
    """This rank's micro-batches of each step from `first_step` (from 0) to the last, loaded by `data.workers` processes
    and on their way to the GPU one step ahead.

    `seed` of a micro-batch is a function of the config's seed, the step, and its number in the step: what layers draw
    is then the same in a run that was resumed, on any number of ranks.
    """
    options = setup.config.data
    sampler = setup.build_sampler(first_step)
    used: Mapping[str, Collection[Frame]] = setup.labels
    # under the other regimes a draw names the labels it may bring, and all there are of these are used
    if name_regime(setup.config.data.labels) in ("budget", "file") or options.hold_out:
        used = {name: {setup.frames[index] for index in indices} for name, indices in setup.assignment.items()}
    augmentation = Augmentation(**options.augment.model_dump())
    dataset = FrameDataset(
        setup.frames, setup.data.roots, setup.tasks, setup.size, augmentation, labels=used, for_training=True,
        teachers=setup.teachers, taught=setup.taught,
    )  # fmt: skip

    def gather(batches: Iterator[Any]) -> Iterator[Cycle]:
        for step in range(first_step, setup.config.train.steps):
            draw = random.Random(f"layers {setup.config.seed} {step}")
            seeds = [draw.getrandbits(63) for _ in range(sampler.count_micro_batches(step))]
            yield [next(batches) | {"seed": seeds[number]} for number in sampler.list_own(step)]

    with closing(load_batches(dataset, options.workers, setup.device, batch_sampler=sampler)) as batches:
        yield from send_ahead(gather(batches), setup.device)


def validate(setup: Setup, state: RunState, run: Run, stop: StopFlag) -> None:
    """Score on the validation frames, log the scores, and keep the weights if their mean skill is the best so far."""
    options, progress = setup.config.evaluate, state.progress
    frames = setup.data.subsets["val"][: options.limit]
    scores = {}
    if frames:
        workers = min(setup.config.data.workers, 2)
        scores = evaluate(
            state.validated_net, setup.tasks, frames, setup.data, setup.size, setup.device, options.micro_batch,
            workers, stop.check, options.protocol, setup.labels, ranks=setup.ranks,
        )  # fmt: skip
        run.log_event("evaluate", progress.step, **flatten_scores(scores))
        for score in scores.values():
            del score["scored_frames"]  # they are in the record
    skill = mean_skill(scores)
    # without scores, the last weights are kept
    if skill is None or progress.best_skill is None or skill > progress.best_skill:
        progress.best_skill = skill
        run.save_best(state, describe_model(setup), scores)
        if scores and setup.ranks.first:
            tqdm.write(format_table({run.folder.name: scores}))
    progress.validated = True


def train(config: Config, folder: Path, resume: bool, stop: StopFlag | None = None, ranks: Ranks | None = None) -> None:
    """The whole run, from the config to the best weights; StoppedError after a signal."""
    stop, ranks = stop or StopFlag(), ranks or Ranks()
    set_determinism(config, pick_device(config.train.device))
    run = Run(folder, config, resume, ranks)
    try:
        if run.progress.step == config.train.steps and run.progress.validated:
            if ranks.first:
                tqdm.write(f"{folder} is finished: all {config.train.steps} steps are done")
            return
        setup = prepare_together(config, run, ranks)
        state = build_state(setup, load_pretrained=not run.progress.step)
        run.start(setup.record, setup.write_assignment(), state)
        if ranks.first:
            print_start(setup, state)
        run_steps(setup, state, run, stop)
    finally:
        run.close()


def prepare_together(config: Config, run: Run, ranks: Ranks) -> Setup:
    """The first rank prepares the run; the others do it with what it has found, as if they resumed."""
    setup = ranks.lead(lambda: SharedSetup(prepare(config, run.record, run.assignment, ranks)))
    if setup.whole is not None:
        return setup.whole
    return prepare(config, setup.record, setup.assignment, ranks)


class SharedSetup:
    """A setup, of which other ranks get the record and the assignment alone."""

    def __init__(self, whole: Setup):
        self.whole: Setup | None = whole
        self.record, self.assignment = whole.record, whole.write_assignment()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"whole": None}


def run_steps(setup: Setup, state: RunState, run: Run, stop: StopFlag) -> None:
    """The training loop, from the step that `state` has reached to the last; whatever ends it, its work is kept."""
    options, progress = setup.config.train, state.progress
    measure_every = setup.config.balancing.measure_every
    cycles = load_cycles(setup, progress.step)
    ask_teacher = None
    if options.mean_teacher is not None:
        assert state.ema is not None
        autocast = choose_autocast(options.precision, setup.device)
        ask_teacher = MeanTeacher(state.ema.net, setup.tasks, setup.size, setup.device, autocast)
    between_steps = True
    try:
        if not progress.validated:
            validate(setup, state, run, stop)
            run.save(state)
        steps = range(progress.step, options.steps)
        for step in tqdm(steps, initial=progress.step, total=options.steps, disable=not setup.ranks.first):
            cycle, counts, soft = take_cycle(cycles, setup, stop, step, ask_teacher)

            # a step: gradients of all tasks, one update
            between_steps = False
            start_training(state.net, options.freeze)
            measure = measure_every is not None and (step + 1) % measure_every == 0
            losses, measures = state.update.step(step, cycle, counts, measure, soft)
            progress.step = step + 1
            if state.ema is not None:
                state.ema.update(state.net, step + 1)
            between_steps = True

            # once in a while: log, save, validate; saving comes first, because validation reads other files
            last = progress.step == options.steps
            progress.validated = not (last or progress.step % options.evaluate_every == 0)
            if progress.step % options.log_every == 0 or last or measure:
                if soft is not None:
                    measures |= {f"taught/{name}": count for name, count in soft.counts.items()}
                losses = {f"loss/{name}": loss for name, loss in losses.items()}
                run.log_event("train", progress.step, **losses, **measures)
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


def take_cycle(
    cycles: Iterator[Cycle],
    setup: Setup,
    stop: StopFlag,
    step: int,
    ask_teacher: Callable[[Cycle], Cycle] | None = None,
) -> tuple[Cycle, dict[str, int], SoftCounts | None]:
    """The next step's micro-batches of this rank, with what a mean teacher says about them; and the counts of their
    labels, and of what teachers say, on all ranks, of the tasks that have such a row on any. A signal, or an error in
    loading, on one rank ends all before the same step."""
    cycle: Cycle = []
    problem: Exception | None = None
    try:
        stop.check()
        cycle = next(cycles)
        if ask_teacher is not None:
            cycle = ask_teacher(cycle)
    except (StoppedError, OSError, ValueError, WorkerError) as error:
        problem = error
    names = list(setup.tasks)
    found = [count_labels(names, cycle)] + ([count_labels(names, cycle, "soft_counts")] if setup.ramp else [])
    totals = iter(setup.ranks.agree([number for pair in found for part in pair for number in part], problem))
    counts, rows, *soft = ({name: next(totals) for name in names} for _ in range(2 * len(found)))
    labelled = {name: int(counts[name]) for name in names if rows[name]}
    if setup.ramp is None:
        return cycle, labelled, None
    said = {name: soft[0][name] for name in names if soft[1][name]}
    return cycle, labelled, SoftCounts(said, setup.ramp.find_weight(step)) if said else None


def save_after(error: Exception, state: RunState, run: Run) -> None:
    """Keep the work of a run that an error ends; if that fails, too, the checkpoint before stays the newest."""
    try:
        run.save(state, after_error=True)
    except (OSError, RankError) as second:
        if run.ranks.first:
            tqdm.write(f"train: step {state.progress.step} could not be saved: {second}", file=sys.stderr)
    else:
        if run.ranks.first and not isinstance(error, StoppedError):
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
        "picture_size": list(setup.data.size),
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
    if setup.teachers is not None:
        labels += "; pseudo-labels: "
        labels += ", ".join(f"{name} {len(frames)}" for name, frames in setup.teachers.frames.items())
    sizes = ", ".join(f"{subset} {len(frames)}" for subset, frames in setup.data.subsets.items())
    for note in setup.teachers.notes if setup.teachers is not None else ():
        tqdm.write(note)
    where = f"{setup.device}" if setup.ranks.alone else f"{setup.ranks.world} ranks"
    tqdm.write(f"{parameters / 1e6:.1f} M parameters on {where}; frames: {sizes}; training labels: {labels}")


def main(command: tuple[Config, Path, bool] | None = None, stop: StopFlag | None = None) -> int:
    config, folder, resume = command or read_arguments()
    stop, ranks = stop or StopFlag(), Ranks()
    try:
        ranks = join_ranks(config.train.device, config.train.timeout)
        train(config, folder, resume, stop, ranks)
    except (WrongUseError, StoppedError, OSError, ValueError, NonFiniteError, WorkerError, RankError) as error:
        code = name_exit_code(error)
        if ranks.speaks:
            advice = f"; the same command with --resume goes on from {folder}" if code == STOPPED else ""
            print(f"train: {'stopped' if code == STOPPED else error}{advice}", file=sys.stderr)
        return code
    except (RuntimeError, MemoryError) as error:
        if (explanation := explain_memory(error) or explain_worker_death(error)) is None:
            raise
        print(f"train: {explanation}", file=sys.stderr)
        return ERROR
    finally:
        ranks.close()
    if ranks.first and (folder / "best.safetensors").exists():
        print(f"best weights: {folder / 'best.safetensors'}")
    return DONE


def name_exit_code(error: Exception) -> int:
    if isinstance(error, StoppedError):
        return STOPPED
    return WRONG_USE if isinstance(error, WrongUseError) else ERROR


if __name__ == "__main__":
    sys.exit(main(COMMAND, STOP))
