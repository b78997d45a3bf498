"""A grid of runs: what a study trains, read from a YAML file, and the results that are there already.

An *arm* is a way to learn all tasks: four networks of one task each, or one shared network. It is trained once for each
of its seeds. What a run is, is its config, its dataset, and the runs it learns from; a digest of these names it, so a
result that is kept counts wherever it was made, and one whose config has changed since does not.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError, field_validator, model_validator

from a2d2.images import read_json, read_yaml
from a2d2.predictions import digest_file
from tasks.options import OPTIONS, Closed
from training.config import Config, ConfigError, config_to_dict, load_config
from training.files import write_json
from training.run import list_deciding_options

FORMAT = 2  # of results
WEIGHTS = "best.safetensors"  # in the folder of a run
SHARED = "shared"  # the network of all tasks; a network of one task has that task's name
OWN = (
    "format",
    "digest",
    "arm",
    "network",
    "seed",
    "setting",
    "finalist",
    "options",
)  # in a result, what names its run
REQUIRED = (*OWN, "cost", "made", "failed", "skill", "val", "weights", "teachers")
LOCAL = ("model.encoder.weights", "data.pseudo.roots")  # where a file lies decides nothing


class GridError(ValueError):
    """A grid that cannot be used; the message names the file and the key."""


class SyntheticSet(Closed):
    """The dataset of the study, which `python -m a2d2.synthetic` and the preprocessing scripts write from these
    options alone."""

    out: str
    scenes: PositiveInt
    frames: PositiveInt
    size: str
    seed: NonNegativeInt
    roads: str
    processed: str

    def count_training_frames(self, share: float) -> int:
        """Of a split by scene, of which so many scenes are for training."""
        return round(self.scenes * share) * self.frames

    @property
    def is_complete(self) -> bool:
        """Whether every training frame has a label."""
        return True

    @property
    def root(self) -> str:
        """The folder of the preprocessed dataset."""
        return f"{self.out}/processed/{self.processed}"

    def have_both(self, task: str, other: str) -> bool:
        """Whether frames with a label of the one have that of the other."""
        return True


class GivenSet(Closed):
    """A dataset that is there already, where `data.roots` of the base says: its name, the size of its pictures, and the
    number of training frames, and of those with a label. `together`: the tasks whose labels the same frames have, one
    group after the other; by default a frame with a label has those of all."""

    about: str
    processed: str
    training_frames: PositiveInt
    labelled_frames: PositiveInt
    together: tuple[tuple[Literal[*OPTIONS], ...], ...] = ()  # type: ignore[valid-type]

    @property
    def is_complete(self) -> bool:
        return self.labelled_frames == self.training_frames

    def count_training_frames(self, share: float) -> int:
        return self.training_frames

    def have_both(self, task: str, other: str) -> bool:
        """Whether frames with a label of the one have that of the other."""
        return not self.together or any(task in group and other in group for group in self.together)


class Tuning(Closed):
    """`settings`: options of a config that are tried, each in a run of `share` of the steps with the first seed.
    `finals`: an option whose values are tried again in whole runs, each with the setting that was the best of those
    that have it; null: the best of all settings is taken. A rate that is the best of a short run can be too high for a
    whole one."""

    share: Annotated[float, Field(gt=0, le=1)]
    settings: tuple[dict[str, Any], ...] = Field(min_length=1)
    finals: str | None = None

    @model_validator(mode="after")
    def check_finals(self):
        if self.finals is not None and any(self.finals not in setting for setting in self.settings):
            raise ValueError(f"finals: every setting must have the option {self.finals}")
        return self

    def list_finals(self) -> list[list[int]]:
        """For each run of the second round, the settings that it takes the best of."""
        if self.finals is None:
            return []
        groups: dict[str, list[int]] = {}
        for number, setting in enumerate(self.settings):
            groups.setdefault(json.dumps(setting[self.finals]), []).append(number)
        return list(groups.values())


class Arm(Closed):
    """`networks`: one for each task, or one for all; `tasks`: by default all of the base config. `set`: options that
    differ from the base. `tuned`: whose tuning it inherits, itself for an arm that is tuned; null: none. `teachers`:
    the arm whose runs of the same seed have made its pseudo-labels. `calibrated_by`: the arm whose first runs have held
    labels back, on which the confidence of this arm's pseudo-labels is calibrated. `steps`: multiple of the base's
    steps."""

    title: str
    networks: Literal["single", "shared"]
    seeds: tuple[NonNegativeInt, ...] = Field(min_length=1)
    tasks: tuple[Literal[*OPTIONS], ...] | None = None  # type: ignore[valid-type]
    base: str | None = None
    set: dict[str, Any] = Field({})
    tuned: str | None = None
    teachers: str | None = None
    calibrated_by: str | None = None
    steps: Annotated[float, Field(gt=0)] = 1.0


class Study(Closed):
    """The content of the file of a grid. The seed of a run is also that of the assignment of labels, unless an arm sets
    data.labels_seed, so all arms of one seed have the same labels."""

    title: str = ""
    base: str
    dataset: SyntheticSet | GivenSet
    tuning: Tuning | None = None
    arms: dict[str, Arm] = Field(min_length=1)
    subset: Literal["test", "val"] = Field("test", description="that tables are about; opened by tabulate.py")
    without: tuple[Literal[*OPTIONS], ...] = Field(  # type: ignore[valid-type]
        (), description="tasks without each of which Delta-m is given too"
    )
    comparisons: tuple["Comparison", ...] = ()
    curves: tuple["Curves", ...] = ()
    blocks: dict[str, dict[str, Any]] = Field({}, description="options that several arms refer to by YAML's anchors")

    @field_validator("arms")
    @classmethod
    def check_names(cls, arms):
        for name in arms:
            if not name.replace("_", "").isalnum():
                raise ValueError(f"the arm {name!r} must have a name of letters, digits and underscores")
        return arms

    @model_validator(mode="after")
    def check_references(self):
        for name, arm in self.arms.items():
            references = (("tuned", arm.tuned), ("teachers", arm.teachers), ("calibrated_by", arm.calibrated_by))
            for key, other in references:
                if other is not None and other not in self.arms:
                    raise ValueError(f"arms.{name}.{key} = {other!r}: there is no such arm")
            if arm.teachers is not None and (missing := set(arm.seeds) - set(self.arms[arm.teachers].seeds)):
                raise ValueError(f"arms.{name}: its teachers {arm.teachers} have no seed {min(missing)}")
            if arm.tuned is not None and self.tuning is None:
                raise ValueError(f"arms.{name}.tuned = {arm.tuned!r}, and the grid has no tuning")
            if arm.tuned is not None and self.arms[arm.tuned].networks != arm.networks:
                raise ValueError(f"arms.{name}.tuned = {arm.tuned!r}: that arm has other networks")
            if arm.tuned is not None and self.arms[arm.tuned].tuned != arm.tuned:
                raise ValueError(f"arms.{name}.tuned = {arm.tuned!r}: that arm is not tuned itself")
        for comparison in self.comparisons:
            named = (*comparison.arms, comparison.reference, comparison.goal, comparison.rest)
            for arm in (name for name in named if name is not None):
                if arm not in self.arms:
                    raise ValueError(f"comparisons: there is no arm {arm!r}")
            if comparison.reference in comparison.arms:
                raise ValueError(f"comparisons: {comparison.title!r} compares {comparison.reference!r} with itself")
            trained = self.arms[comparison.reference].tasks or tuple(OPTIONS)
            if comparison.rest is not None and set(self.arms[comparison.rest].tasks or OPTIONS) <= set(trained):
                raise ValueError(
                    f"comparisons: {comparison.title!r}: rest = {comparison.rest!r} trains no task that "
                    f"{comparison.reference!r} does not train"
                )
        titles = [name_file(each.title) for each in (*self.comparisons, *self.curves)]
        if alike := next((title for title in titles if titles.count(title) > 1), None):
            raise ValueError(f"comparisons, curves: two plots would be called {alike}.png; change a title")
        for curves in self.curves:
            for arm in (arm for line in curves.lines.values() for arm in line):
                if arm not in self.arms:
                    raise ValueError(f"curves: there is no arm {arm!r}")
        return self


class Comparison(Closed):
    """A table: `arms` against `reference`, on the seeds that both have; `rest`: the arm whose scores stand for tasks
    that the reference does not train; `about`: a sentence above it; `goal`: the arm of which a column says how much of
    the way to it the others have come."""

    title: str
    reference: str
    rest: str | None = None
    arms: tuple[str, ...] = Field(min_length=1)
    about: str = ""
    goal: str | None = None

    @property
    def references(self) -> tuple[str, ...]:
        """The arms that the reference is made of."""
        return (self.reference,) if self.rest is None else (self.reference, self.rest)


class Curves(Closed):
    """A plot: scores of some `tasks` over the number of labels; `lines`: name of a line -> its arms; `others`: task ->
    name -> a score that others have published."""

    title: str
    tasks: tuple[Literal[*OPTIONS], ...] = Field(min_length=1)  # type: ignore[valid-type]
    lines: dict[str, tuple[str, ...]] = Field(min_length=1)
    others: dict[str, dict[str, float]] = Field({})


Study.model_rebuild()


def name_file(title: str) -> str:
    """A title as the name of a file, without ending."""
    return "".join(letter if letter.isalnum() else "_" for letter in title.lower()).strip("_")


@dataclass(frozen=True)
class Run:
    """One training run. `network`: SHARED or a task. `setting`: the number of a tuned setting, `finalist`: that of a
    run of the second round of tuning, both None for a run of the study itself. `teachers`: the runs that make its
    pseudo-labels."""

    arm: str
    network: str
    seed: int
    tasks: tuple[str, ...]
    setting: int | None = None
    finalist: int | None = None
    teachers: tuple["Run", ...] = ()

    @property
    def is_tuning(self) -> bool:
        return self.setting is not None or self.finalist is not None

    @property
    def name(self) -> str:
        if self.setting is not None:
            kind = f"setting{self.setting}"
        else:
            kind = f"seed{self.seed}" if self.finalist is None else f"finalist{self.finalist}"
        return f"{self.arm}.{self.network}.{kind}"


@dataclass
class Grid:
    """`path`: of its file; `results`: folder of the results; `weights`: name of an encoder -> file with its ImageNet
    weights, in place of timm's."""

    path: Path
    study: Study
    results: Path
    weights: Mapping[str, str] = field(default_factory=dict)
    _configs: dict[tuple[str, ...], Config] = field(default_factory=dict)

    @cached_property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self._load(self.study.base, []).tasks)

    def _load(self, base: str, overrides: Sequence[str]) -> Config:
        key = (base, *overrides)
        if key not in self._configs:
            try:
                self._configs[key] = load_config(base, [*overrides], OPTIONS)
            except ConfigError as error:
                raise GridError(f"{self.path}: {error}") from error
        return self._configs[key]

    def list_runs(self) -> list[Run]:
        """All runs, those that others wait for first."""
        runs: dict[str, Run] = {}
        for name, arm in self.study.arms.items():
            if arm.tuned == name:
                first = (
                    run
                    for setting in range(self.count_settings())
                    for run in self._list_networks(name, arm, arm.seeds[0], setting)
                )
                second = (
                    run
                    for finalist in range(len(self._list_finals()))
                    for run in self._list_networks(name, arm, arm.seeds[0], finalist=finalist)
                )
                runs |= {run.name: run for run in (*first, *second)}
        waiting = dict(self.study.arms)
        while waiting:
            ready = [
                name for name, arm in waiting.items()
                if arm.teachers not in waiting and (arm.teachers is None or self._find_calibrator(arm) not in waiting)
            ]  # fmt: skip
            if not ready:
                raise GridError(f"{self.path}: the arms {', '.join(waiting)} wait for each other as teachers")
            for name in ready:
                arm = waiting.pop(name)
                for seed in arm.seeds:
                    for run in self._list_networks(name, arm, seed):
                        runs[run.name] = run
        return list(runs.values())

    def _list_networks(
        self, name: str, arm: Arm, seed: int, setting: int | None = None, finalist: int | None = None
    ) -> Iterator[Run]:
        tasks = arm.tasks or self.tasks
        networks = {SHARED: tasks} if arm.networks == "shared" else {task: (task,) for task in tasks}
        for network, own in networks.items():
            teachers: tuple[Run, ...] = ()
            if arm.teachers is not None:
                others = self._list_networks(arm.teachers, self.study.arms[arm.teachers], seed)
                teachers = tuple(other for other in others if set(other.tasks) & set(own))
            yield Run(name, network, seed, own, setting, finalist, teachers)

    def count_settings(self) -> int:
        return 0 if self.study.tuning is None else len(self.study.tuning.settings)

    def _list_finals(self) -> list[list[int]]:
        return [] if self.study.tuning is None else self.study.tuning.list_finals()

    def _find_calibrator(self, arm: Arm) -> str | None:
        """The arm that the teachers of an arm are calibrated by."""
        return None if arm.teachers is None else self.study.arms[arm.teachers].calibrated_by

    def find_calibration(self, teacher: Run) -> Run | None:
        """The run on whose held-out labels the pseudo-labels of a teacher are calibrated."""
        name = self.study.arms[teacher.arm].calibrated_by
        if name is None:
            return None
        arm = self.study.arms[name]
        found = [run for run in self._list_networks(name, arm, arm.seeds[0]) if set(run.tasks) <= set(teacher.tasks)]
        return found[0] if found else None

    def list_needed(self, run: Run) -> list[Run]:
        """The runs that must be finished before this one."""
        calibrations = [self.find_calibration(teacher) for teacher in run.teachers]
        return [*self.list_tuning(run), *run.teachers, *(each for each in calibrations if each is not None)]

    def list_tuning(self, run: Run) -> list[Run]:
        """The runs that decide its tuned options: for a run of the study those of the last round, for one of the second
        round those of the first; none for a run of the first, and for an arm that is not tuned."""
        arm = self.study.arms[run.arm]
        if run.setting is not None or arm.tuned is None:
            return []
        tuned, groups = self.study.arms[arm.tuned], self._list_finals()
        seed = tuned.seeds[0]
        if run.finalist is None and groups:
            candidates = [
                other
                for finalist in range(len(groups))
                for other in self._list_networks(arm.tuned, tuned, seed, finalist=finalist)
            ]
        else:
            settings = range(self.count_settings()) if run.finalist is None else groups[run.finalist]
            candidates = [
                other for setting in settings for other in self._list_networks(arm.tuned, tuned, seed, setting)
            ]
        return [other for other in candidates if other.network == run.network]

    def find_best_setting(self, run: Run) -> int | None:
        """The setting with the best validation score; None for an arm that is not tuned. KeyError if one is missing."""
        candidates = self.list_tuning(run)
        if not candidates:
            return run.setting
        skills = {}
        for other in candidates:
            result = self.read_result(other)
            if result is None:
                raise KeyError(other.name)
            skills[self.find_best_setting(other)] = -float("inf") if result["skill"] is None else result["skill"]
        return max(skills, key=lambda setting: skills[setting])

    def list_overrides(self, run: Run, tuned: bool = True) -> dict[str, Any]:
        """The options in which a run differs from its base. KeyError while its tuning is not finished, unless it is
        asked for `tuned` False, as if the first setting had won."""
        arm = self.study.arms[run.arm]
        values: dict[str, Any] = {f"tasks.{name}": None for name in self.tasks if name not in run.tasks}
        setting = 0 if self.list_tuning(run) and not tuned else run.setting
        if tuned:
            setting = self.find_best_setting(run)
        if setting is not None:
            assert self.study.tuning is not None
            values |= self.study.tuning.settings[setting]
        values |= {"seed": run.seed, "data.labels_seed": run.seed} | arm.set
        left_out = tuple(f"tasks.{name}." for name in self.tasks if name not in run.tasks)
        values = {key: value for key, value in values.items() if not key.startswith(left_out)} if left_out else values
        for key in ("data.labels", "data.hold_out"):
            values |= {key: keep_own(values[key], run.tasks)} if key in values else {}
        share = arm.steps if run.setting is None or self.study.tuning is None else self.study.tuning.share
        if share != 1:
            config = self._load(arm.base or self.study.base, write_overrides(values))
            values |= scale_steps(config, share)
        return values

    def list_arguments(self, run: Run, roots: Sequence[str] = (), tuned: bool = True, local: bool = True) -> list[str]:
        """Those of train.py, but for --run; `roots`: those of its pseudo-labels; `local`: with files that lie elsewhere
        on every machine. KeyError like list_overrides."""
        arm = self.study.arms[run.arm]
        base = arm.base or self.study.base
        values = self.list_overrides(run, tuned) | {"run": run.name}
        if run.teachers:
            values |= {"data.pseudo.roots": list(roots) or ["pseudo"]}
        overrides = write_overrides(values)
        encoder = self._load(base, overrides).model.encoder
        if local and encoder.pretrained and encoder.name in self.weights:
            overrides.append(f"model.encoder.weights={json.dumps(self.weights[encoder.name])}")
        return ["--config", base, *overrides]

    def resolve(self, run: Run, roots: Sequence[str] = (), tuned: bool = True) -> Config:
        """Its config; see list_arguments."""
        _, base, *overrides = self.list_arguments(run, roots, tuned)
        config, dataset = self._load(base, overrides), self.study.dataset
        if isinstance(dataset, SyntheticSet) and config.data.roots != [dataset.root]:
            raise GridError(
                f"{self.path}: dataset is written into {dataset.root}, and data.roots = {config.data.roots}"
            )
        return config

    def digest(self, run: Run) -> str:
        """A fingerprint of all that decides its result. KeyError while its tuning is not finished."""
        options = list_deciding_options(config_to_dict(self.resolve(run)))
        kept = {key: value for key, value in options.items() if key not in LOCAL}
        if (split_file := kept.get("data.split_file")) is not None:
            kept["data.split_file"] = self._read_split(split_file)
        dataset = self.study.dataset.model_dump(mode="json", exclude={"out"})
        needed = [*run.teachers, *(each for teacher in run.teachers if (each := self.find_calibration(teacher)))]
        content = [kept, dataset, sorted(self.digest(other) for other in needed)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def _read_split(self, path: str) -> Any:
        """What a file says that lists a split: its name decides nothing."""
        try:
            return read_yaml(Path(path))
        except ValueError as error:
            raise GridError(f"{self.path}: data.split_file: {error}") from error

    def result_path(self, run: Run) -> Path:
        return self.results / f"{run.name}.json"

    def read_result(self, run: Run) -> dict[str, Any] | None:
        """The result of a run; None if there is none, it is not whole, or it is that of another config. KeyError while
        its tuning is not finished."""
        try:
            content = read_json(self.result_path(run))
        except (OSError, ValueError):
            return None
        whole = isinstance(content, dict) and content.get("format") == FORMAT and content.keys() >= set(REQUIRED)
        return content if whole and content["digest"] == self.digest(run) else None

    def find_twin(self, run: Run) -> Run | None:
        """A run that is done and was trained with the very same config: of tuning and of the study itself there may be
        two names for one. KeyError like digest."""
        digest = self.digest(run)
        for other in self.list_runs():
            alike = (other.network, other.seed, other.is_tuning) == (run.network, run.seed, not run.is_tuning)
            try:
                if alike and self.read_result(other) is not None and self.digest(other) == digest:
                    return other
            except KeyError:
                continue
        return None

    def identify(self, run: Run) -> dict[str, Any]:
        """What names a run in its result. To be asked for before it is trained: what was tuned can change meanwhile.
        KeyError like digest."""
        names = (run.arm, run.network, run.seed, run.setting, run.finalist)
        return dict(zip(OWN, (FORMAT, self.digest(run), *names, self.list_overrides(run)), strict=True))

    def write_result(self, run: Run, content: Mapping[str, Any]) -> None:
        """`content`: with what `identify` has said."""
        self.results.mkdir(parents=True, exist_ok=True)
        assert content.keys() >= set(REQUIRED), run.name
        write_json(self.result_path(run), dict(content))


def has_weights(result: Mapping[str, Any], folder: Path) -> bool:
    """Whether the weights in the folder of a run are those that its result is about: results travel from machine to
    machine, and weights stay."""
    path = folder / WEIGHTS
    return result["weights"] is not None and path.is_file() and result["weights"] == digest_file(path)


def write_overrides(values: Mapping[str, Any]) -> list[str]:
    """Options as arguments of train.py."""
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def keep_own(value: Any, tasks: Sequence[str]) -> Any:
    """A budget of labels, or shares that are held out, without those of tasks that a run does not train. A name that is
    no task's stays, so that the config refuses it."""
    if isinstance(value, dict) and "budget" in value:
        return {"budget": keep_own(value["budget"], tasks)}
    shares = isinstance(value, dict) and all(isinstance(share, int | float) for share in value.values())
    if not shares:
        return value
    return {name: share for name, share in value.items() if name in tasks or name not in OPTIONS}


def scale_steps(config: Config, share: float) -> dict[str, Any]:
    """Overrides for a run of a share of the steps, with the schedule scaled alike."""
    train = config.train
    steps = max(1, round(train.steps * share))
    return {
        "train.steps": steps,
        "train.schedule.warmup_steps": round(train.schedule.warmup_steps * share),
        "train.evaluate_every": max(1, round(train.evaluate_every * share)),
        "train.save_every": max(1, round(train.save_every * share)),
    }


def read_grid(path: Path, weights: Mapping[str, str] | None = None, results: Path | None = None) -> Grid:
    """GridError for a file that cannot be read, or is no grid; all problems at once."""
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise GridError(str(error)) from error
    try:
        study = Study.model_validate_json(json.dumps(content), strict=True)
    except ValidationError as error:
        problems = [
            f"{path}: {'.'.join(map(str, each['loc']))}: {each['msg'].removeprefix('Value error, ')}"
            for each in error.errors(include_url=False)
        ]
        raise GridError("\n".join(problems)) from error
    return Grid(path, study, results or Path(__file__).parent / "results" / path.stem, weights or {})
