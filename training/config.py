"""The config of a run: its schema, its defaults, and errors that name the file, the key, the value and the way out.

A YAML file holds only what differs from the defaults below. The options of the tasks are defined elsewhere:
`load_config` is given one pydantic model per task and composes the schema from them.
"""

import difflib
import functools
import json
import os
import re
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    create_model,
    field_serializer,
    field_validator,
)

from training.files import whole_file
from training.renamed import find_new_key, find_other_word

LONGEST_VALUE = 60


class ConfigError(ValueError):
    """Everything that is wrong with a config: `problems`, one line each; `str(error)` is those lines.

    Line breaks and control characters, which a key or an override can hold, are written as escapes.
    """

    def __init__(self, problems: list[str]):
        self.problems = [
            "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in problem)
            for problem in problems
        ]
        super().__init__("\n".join(self.problems))


class Closed(BaseModel):
    """A block of the config: unknown keys are errors, defaults are checked like given values, nothing changes later."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, frozen=True)


class Augment(Closed):
    flip: float = Field(0.5, ge=0, le=1, description="probability of mirroring a frame left to right")
    scale: tuple[Annotated[float, Field(ge=1)], Annotated[float, Field(ge=1)]] = Field(
        (1.0, 1.0), description="smallest and largest zoom into the image, drawn for each frame; 1 is none"
    )
    color: float = Field(0.0, ge=0, le=1, description="strength of random brightness, contrast and saturation")
    blur: float = Field(0.0, ge=0, le=1, description="probability of blurring a frame")
    cutouts: NonNegativeInt = Field(
        0, description="at most so many rectangles of a frame are made gray; what they hide of a label is left out"
    )

    @field_validator("scale")
    @classmethod
    def check_order(cls, scale):
        if scale[0] > scale[1]:
            raise ValueError("must be [smallest, largest]")
        return scale


REGIMES = ("as_is", "symmetric", "one_task", "one_at_a_time")
DEALT = ("symmetric", "one_task")  # those under which it matters which other labels a frame has


def name_regime(labels: Any) -> str:
    """The label regime without its details; budget and file are "as_is" with fewer labels."""
    return labels if isinstance(labels, str) else next(iter(labels))


def check_labels(value: Any) -> Any:
    """One of REGIMES, {regime: tasks} of DEALT, {"budget": {task: share}} or {"file": path}; ValueError for anything
    else."""
    if isinstance(value, str) and value in REGIMES:
        return value
    if isinstance(value, dict) and len(value) == 1:
        ((key, given),) = value.items()
        if key in DEALT and isinstance(given, list) and given and all(isinstance(name, str) for name in given):
            return value
        if key == "file" and isinstance(given, str) and given:
            return value
        if key == "budget" and isinstance(given, dict) and given:
            for name, share in given.items():
                if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
                    raise ValueError(f"the budget of {name} is a share of its labels, above 0 and at most 1")
            return {"budget": {name: float(share) for name, share in given.items()}}
    among = " or ".join(DEALT)
    raise ValueError(
        f"must be {', '.join(REGIMES)}, {{{among}: [task, ...]}}, {{budget: {{task: share, ...}}}} or {{file: "
        f"assignment.json}}"
    )


class Ramp(Closed):
    """How much what a teacher says counts beside true labels, and when."""

    weight: PositiveFloat = Field(
        1.0, description="of a task's loss on what a teacher says, beside that on true labels"
    )
    ramp_steps: NonNegativeInt = Field(0, description="steps over which the weight rises from 0")
    from_step: NonNegativeInt = Field(0, description="first step in which it counts, counted from 0")
    true_labels_only_from: PositiveInt | None = Field(
        None, description="first step in which it does not any more, so that true labels have the last word; null: none"
    )

    @field_validator("true_labels_only_from")
    @classmethod
    def check_order(cls, until, info):
        if until is not None and until <= info.data.get("from_step", 0):
            raise ValueError("must be after from_step")
        return until

    @property
    def steps(self) -> tuple[int, int | None]:
        """(from, until): the steps in which it counts."""
        return self.from_step, self.true_labels_only_from

    def find_weight(self, step: int) -> float:
        """In this step, counted from 0, one of `steps`."""
        return self.weight * min(1.0, (step - self.from_step + 1) / (self.ramp_steps + 1))


class Pseudo(Ramp):
    roots: list[str] = Field(min_length=1, description="folders that pseudo_label.py has written")
    micro_batch: PositiveInt | None = Field(
        None,
        description="frames in a micro-batch of the training frames that no stream of true labels draws; null: as the "
        "largest of train.micro_batch",
    )


class Data(Closed):
    roots: list[str] = Field(
        ["Datasets/processed/1024x640"],
        min_length=1,
        description="folders of preprocessed datasets, relative to the working directory",
    )
    split: str = Field("paper_boxes", description="name of the rule that divides frames into train, val and test")
    split_seed: int = Field(0, description="seed of the splits that draw scenes")
    split_fractions: tuple[NonNegativeFloat, NonNegativeFloat, NonNegativeFloat] = Field(
        (0.7, 0.15, 0.15), description="shares of training, validation and test, for the splits that draw scenes"
    )
    split_file: str | None = Field(
        None, description="for split: listed, a YAML file {train: [frame or scene, ...], val: [...], test: [...]}"
    )
    views: list[str] = Field(["front_center"], min_length=1, description="cameras whose frames are used")
    labels: Annotated[str | dict[str, Any], BeforeValidator(check_labels)] = Field(
        "as_is",
        description="as_is: every label there is; symmetric: only frames that have the labels of all tasks; "
        "one_task: each frame keeps the label of one task; one_at_a_time: every label there is, but a sample brings "
        "only that of its stream's task; {symmetric: [task, ...]}, {one_task: [task, ...]}: the same for a run that "
        "trains some of these tasks alone; {budget: {task: share}}: of a task's labels that share, 0 to 1; {file: "
        "FILE}: those that an assignment.json names",
    )
    labels_seed: NonNegativeInt = Field(0, description="seed of one_task and budget, whatever the seed of the run")
    hold_out: dict[str, float] = Field(
        {},
        description="{task: share}: of the labels that a task would be trained on, those of so many scenes are kept "
        "back, so that pseudo_label.py can calibrate its confidence on them",
    )
    pseudo: Pseudo | None = Field(None, description="also learn from pseudo-labels, where there is no true label")
    workers: NonNegativeInt = Field(4, description="processes that load frames; 0: the main process loads them")
    limit: PositiveInt | None = Field(None, description="use only the first so many frames of each subset, for trials")
    augment: Augment = Field(default_factory=Augment)

    @field_validator("hold_out")
    @classmethod
    def check_hold_out(cls, shares):
        for name, share in shares.items():
            if not 0 < share < 1:
                raise ValueError(f"the share of {name} must be above 0 and below 1")
        return shares

    @field_validator("split_file")
    @classmethod
    def check_split_file(cls, path, info):
        if (path is None) == (info.data.get("split") == "listed"):
            raise ValueError("goes with split: listed, and only with it")
        return path

    @field_validator("split_fractions")
    @classmethod
    def check_sum(cls, fractions):
        if abs(sum(fractions) - 1) > 1e-6:
            raise ValueError(f"must add up to 1, not {sum(fractions):g}")
        return fractions


class Encoder(Closed):
    name: str = Field("resnet50", description="name of a timm model that offers features at strides 4 to 32")
    pretrained: bool = Field(True, description="start from the weights timm has for it")
    weights: str | None = Field(None, description="start from this file instead")
    norm: Literal["frozen", "batch", "group"] = Field(
        "frozen",
        description="frozen: BatchNorm with the statistics it came with; batch: those of the micro-batch; "
        "group: GroupNorm in its place, for an encoder that starts untrained",
    )


class Neck(Closed):
    width: PositiveInt = Field(128, description="channels of every level")
    repeats: PositiveInt = Field(2, description="BiFPN layers")


class Model(Closed):
    kind: Literal["multitask", "unet", "densedepth", "yolo", "pilotnet", "thesis"] = Field(
        "multitask", description="the shared network, one of the four specialists, or the network of the thesis"
    )
    encoder: Encoder = Field(default_factory=Encoder)
    neck: Neck = Field(default_factory=Neck)
    input_size: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="[width, height] in pixels that the network sees; null: the size of the preprocessed datasets"
    )


class Optimizer(Closed):
    lr: PositiveFloat = Field(1e-3, description="learning rate of AdamW at its highest")
    encoder_lr_factor: NonNegativeFloat = Field(0.1, description="the encoder learns at this multiple of lr")
    weight_decay: NonNegativeFloat = Field(0.05, description="not applied to norms and biases")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="decay rates of AdamW's two running means"
    )
    clip: PositiveFloat | None = Field(1.0, description="largest norm of the gradient of a step; null: no limit")


class Schedule(Closed):
    warmup_steps: NonNegativeInt = Field(500, description="steps over which the learning rate rises from 0")
    final_factor: float = Field(0.01, ge=0, le=1, description="the cosine ends at this multiple of lr")


class Ema(Closed):
    decay: float = Field(0.9995, ge=0, lt=1, description="of the EMA weights, for each step")
    ramp: NonNegativeInt = Field(2000, description="steps over which the decay rises to that value")


class Group(Closed):
    lr: PositiveFloat = Field(description="learning rate of its Adam, which stays the same")
    samples: PositiveInt = Field(description="labelled samples whose gradients make a step")


MICRO_BATCH = 4  # frames


def check_micro_batch(value: Any) -> Any:
    """A number of frames, or {task: number}; ValueError for anything else."""
    numbers = list(value.values()) if isinstance(value, dict) and value else [value]
    if all(type(number) is int and number > 0 for number in numbers):
        return value
    raise ValueError("must be a whole number above 0, or such a number for each of some tasks: {task: number, ...}")


class Train(Closed):
    steps: PositiveInt = Field(60000, description="cycles of micro-batches of all tasks; each updates the weights once")
    micro_batch: Annotated[int | dict[str, int], BeforeValidator(check_micro_batch)] = Field(
        MICRO_BATCH,
        description="frames in a micro-batch; {task: number}: of the stream of each task, 4 where none is given",
    )
    cycle: PositiveInt = Field(
        1, description="micro-batches of each task in a step (gradient accumulation), on all ranks together"
    )
    merge: bool = Field(False, description="one pass for the micro-batches of all tasks: faster, for more memory")
    freeze: list[str] = Field([], description="parts that do not learn: encoder, neck, heads.<task>")
    update: Literal["cycle", "async"] = Field(
        "cycle",
        description="cycle: one optimizer, which steps after every cycle; async: an Adam for every group, which steps "
        "when it has seen enough samples",
    )
    groups: dict[str, Group] = Field(
        {}, description="for async, in place of optimizer and schedule: encoder (and neck), and the head of each task"
    )
    optimizer: Optimizer = Field(default_factory=Optimizer)
    schedule: Schedule = Field(default_factory=Schedule)
    init: str | None = Field(
        None, description="start from the weights of this run folder or weights file, as far as they fit"
    )
    ema: Ema | None = Field(default_factory=Ema, description="exponential moving average of the weights; null: off")
    mean_teacher: Ramp | None = Field(
        None,
        description="also learn, where there is no true label, what the EMA weights say about the same frame without "
        "its change of colour, blur and cutouts; null: off",
    )
    precision: Literal["auto", "fp32", "bf16", "fp16", "fp64"] = Field(
        "auto", description="auto: bf16 where the GPU has it, else fp32; fp64: to compare runs to the last digits"
    )
    channels_last: bool = Field(True, description="memory layout of images and features")
    recompute: bool = Field(False, description="compute the neck's fusions twice, for less memory")
    compile: bool = Field(False, description="compile encoder, neck and heads with torch.compile")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")
    timeout: PositiveFloat = Field(900.0, description="seconds that a rank waits for the others")
    evaluate_every: PositiveInt = Field(1000, description="steps between two evaluations")
    save_every: PositiveInt = Field(1000, description="steps between two checkpoints")
    keep_checkpoints: PositiveInt = Field(2, description="how many of the newest checkpoints stay")
    log_every: PositiveInt = Field(50, description="steps between two lines of metrics")

    @field_serializer("groups")
    def serialize_groups(self, groups):
        return {name: group.model_dump(mode="json") for name, group in groups.items()}


LOSS_METHODS: dict[str, dict[str, float]] = {
    "sum": {},
    "uncertainty": {"lr": 0.01},
    "dwa": {"temperature": 2.0, "window": 1000.0},
    "famo": {"lr": 0.025, "decay": 0.001},
    "rlw": {},
    "geometric": {},
    "label_frequency": {"window": 1000.0, "limit": 10.0},
}
GRADIENT_METHODS: dict[str, dict[str, float]] = {
    "pcgrad": {},
    "mgda": {},
    "imtlg": {},
    "aligned_mtl": {},
    "gradvac": {"beta": 0.01},
    "cagrad": {"c": 0.4},
    "upgrad": {},
    "dualproj": {},
    "fairgrad": {"alpha": 1.0},
    "nashmtl": {"max_norm": 1.0},
}
"""The methods of balancing, and their options with their defaults."""


class Balancing(Closed):
    weights: dict[str, NonNegativeFloat] = Field({}, description="weight of a task's loss; 1 where none is given")
    method: Literal[(*LOSS_METHODS, *GRADIENT_METHODS)] = Field(  # type: ignore[valid-type]
        "sum", description="how the losses of the tasks become one update, see docs/training.md"
    )
    options: dict[str, PositiveFloat] = Field({}, description="options of the method, see docs/training.md")
    normalise: Literal["none", "init", "running"] = Field(
        "none",
        description="init: divide each loss by its mean over the first steps; running: over the last 100; none: take "
        "it as it is",
    )
    rows: Literal["device", "bf16", "cpu"] = Field(
        "device", description="where the gradients of the tasks are kept apart, for methods that need them"
    )
    measure_every: PositiveInt | None = Field(
        None, description="steps between two lines with norms, cosines and shares of the tasks' gradients; null: none"
    )

    @field_validator("options")
    @classmethod
    def check_options(cls, options, info):
        allowed = find_method_options(info.data.get("method", "sum"))
        if unknown := [name for name in options if name not in allowed]:
            raise ValueError(f"no option {unknown[0]}; this method has {', '.join(allowed) or 'none'}")
        return options

    def complete_options(self) -> dict[str, float]:
        """The options of the method, with its defaults."""
        return find_method_options(self.method) | self.options


def find_method_options(method: str) -> dict[str, float]:
    return dict((LOSS_METHODS | GRADIENT_METHODS)[method])


class Protocol(Closed):
    """What is scored, the same for all runs of a table: `size`, and for each task a block of its own, its
    `Options.Protocol`, by its name."""

    size: tuple[PositiveInt, PositiveInt] | None = Field(
        None, description="[width, height] at which labels are scored; null: the size of the preprocessed datasets"
    )


class Evaluate(Closed):
    micro_batch: PositiveInt = Field(4, description="frames in a micro-batch")
    limit: PositiveInt | None = Field(None, description="evaluate on the first so many frames only")
    protocol: Protocol = Field(
        default_factory=Protocol, description="what is scored; the options of the tasks limit training only"
    )


class Wandb(Closed):
    project: str = Field(description="project on the server")
    entity: str | None = Field(None, description="user or team; null: the default of the account")
    mode: Literal["online", "offline"] = Field("online", description="offline: keep it in the run folder")


class Log(Closed):
    tensorboard: bool = Field(True, description="write event files for TensorBoard")
    wandb: Wandb | None = Field(None, description="also log to Weights & Biases; null: do not")


class Config(Closed):
    """The whole config. `tasks` maps the name of each task that is trained to its own Options, in the order of the
    mapping that `load_config` was given."""

    seed: int = Field(0, ge=0, description="of everything that is random")
    run: str = Field(
        pattern=r"^[^./\\\x00-\x1f][^/\\\x00-\x1f]*(/[^./\\\x00-\x1f][^/\\\x00-\x1f]*)*$",
        description="name of the run's folder; by default the name of the config file without its ending",
    )
    deterministic: Literal[True, False, "warn", "auto"] = Field(
        "auto",
        description="of operations that may differ between two runs, true: refuse them; warn: name each once, and take "
        "the others that are slower on a GPU; false: allow them; auto: as warn on the CPU, as false on a GPU",
    )
    data: Data = Field(default_factory=Data)
    model: Model = Field(default_factory=Model)
    tasks: dict[str, BaseModel]
    train: Train = Field(default_factory=Train)
    balancing: Balancing = Field(default_factory=Balancing)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    log: Log = Field(default_factory=Log)

    @field_validator("balancing")
    @classmethod
    def check_weights(cls, balancing, info):
        tasks = info.data.get("tasks", {})
        if tasks and all(balancing.weights.get(name, 1.0) == 0 for name in tasks):
            raise ValueError("balancing.weights gives every task 0, so nothing would be learned; give one more than 0")
        return balancing

    @field_serializer("tasks")
    def serialize_tasks(self, tasks):
        return {name: options.model_dump(mode="json") for name, options in tasks.items()}

    @field_validator("tasks")
    @classmethod
    def check_budget(cls, tasks, info):
        labels = info.data["data"].labels if "data" in info.data else "as_is"
        if labels == "one_task" and len(tasks) == 1:
            (name,) = tasks
            raise ValueError(
                f"under data.labels: one_task a run of {name} alone would keep every label; name the tasks among which "
                f"the labels are dealt, as for the run it is compared with: data.labels={{one_task: [{name}, ...]}}"
            )
        dealt = labels[regime] if not isinstance(labels, str) and (regime := name_regime(labels)) in DEALT else tasks
        if foreign := [name for name in tasks if name not in dealt]:
            raise ValueError(f"data.labels deals labels among {', '.join(dealt)}, and {foreign[0]} is trained, too")
        budget = labels.get("budget", {}) if isinstance(labels, dict) else {}
        if foreign := [name for name in budget if name not in tasks]:
            raise ValueError(f"data.labels has a budget for {foreign[0]}, which is not trained: {', '.join(tasks)} are")
        kept_back = info.data["data"].hold_out if "data" in info.data else {}
        if foreign := [name for name in kept_back if name not in tasks]:
            raise ValueError(f"data.hold_out names {foreign[0]}, which is not trained: {', '.join(tasks)} are")
        return tasks

    @field_validator("train")
    @classmethod
    def check_streams(cls, train, info):
        tasks, data = info.data.get("tasks"), info.data.get("data")
        if not tasks or data is None:  # they have an error of their own
            return train
        if isinstance(train.micro_batch, dict):
            if foreign := [name for name in train.micro_batch if name not in tasks]:
                raise ValueError(f"micro_batch names {foreign[0]}, which is not trained: {', '.join(tasks)} are")
            if name_regime(data.labels) == "symmetric":
                raise ValueError("micro_batch must be one number under data.labels=symmetric: all tasks share a stream")
        if train.mean_teacher is not None and train.ema is None:
            raise ValueError("mean_teacher needs the EMA weights, and ema is null")
        parts = ("encoder", "neck", *(f"heads.{name}" for name in tasks))
        if unknown := [part for part in train.freeze if part not in parts]:
            raise ValueError(f"freeze names {unknown[0]}; there are {', '.join(parts)}")
        if set(train.freeze) == set(parts):
            raise ValueError("freeze names all parts, so nothing would be learned; leave one out")
        late = [
            name
            for name, options in tasks.items()
            if (learning := getattr(options, "train", None)) is not None and learning.from_step >= train.steps
        ]
        if late:
            raise ValueError(f"tasks.{late[0]}.train.from_step is not below train.steps={train.steps}: it never learns")
        return train

    @field_validator("train")
    @classmethod
    def check_update(cls, train, info):
        data = info.data.get("data")
        ways = [train.mean_teacher, None if data is None else data.pseudo]
        if None not in ways:
            raise ValueError(
                "mean_teacher is one way to learn without labels and data.pseudo another: take one of them"
            )
        for key, way in zip(("train.mean_teacher", "data.pseudo"), ways, strict=True):
            if way is not None and way.from_step >= train.steps:
                raise ValueError(
                    f"{key}.from_step={way.from_step} is not below train.steps={train.steps}: no teacher is ever heard"
                )
        if train.update == "async" and any(way is not None for way in ways):
            raise ValueError("update: async has no use for data.pseudo and mean_teacher; take update: cycle")
        if train.update == "cycle":
            if train.groups:
                raise ValueError("groups are for update: async")
            return train
        if missing := [name for name in ("encoder", *info.data.get("tasks", {})) if name not in train.groups]:
            raise ValueError(f"update: async needs groups for {', '.join(missing)}, each with lr and samples")
        if (train.optimizer, train.schedule) != (Optimizer(), Schedule()):
            raise ValueError("update: async has no use for optimizer and schedule; give its groups their lr")
        if train.precision == "fp16":
            raise ValueError("fp16 needs one loss scale, so all groups would have to step together; take bf16 or fp32")
        if train.freeze or train.merge:
            raise ValueError("update: async has no use for freeze and merge; take update: cycle")
        return train

    @field_validator("balancing")
    @classmethod
    def check_method(cls, balancing, info):
        train = info.data.get("train")
        if train is None:
            return balancing
        if train.update == "async" and (balancing.method != "sum" or balancing.measure_every):
            raise ValueError(
                "update: async steps each group alone, so there is no common gradient for a method to balance or to "
                "measure; take method: sum, or update: cycle"
            )
        if train.precision == "fp16" and (balancing.method in GRADIENT_METHODS or balancing.measure_every):
            raise ValueError("fp16 scales gradients, which would have to be compared without it; take bf16 or fp32")
        return balancing


def load_config(path: str | Path, overrides: list[str], tasks: dict[str, type[BaseModel]]) -> Config:
    """Read a YAML file, apply `key=value` overrides in order, and check everything.

    `tasks` maps the name of every task there is to the model of its options. A task that the file does not name is not
    trained; `depth:` and `depth: {}` take its defaults; the override `tasks.depth=null` removes it again. The values of
    overrides are YAML; a key that is not in the file yet is added.

    Types are strict: `true` is no number and "3" no integer, in the options of the tasks too.

    Raises ConfigError with all problems at once.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: is not a text file in UTF-8"]) from error

    try:
        values, problems = _parse_yaml(text)
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from error
    problems = [f"{path}: {problem}" for problem in problems]
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError([*problems, f"{path}: must hold keys and values, not {_show(values)}"])
    if isinstance(values.get("tasks"), dict):
        values["tasks"] = {name: {} if given is None else given for name, given in values["tasks"].items()}

    overridden = []
    for override in map(_decode, overrides):
        try:
            overridden.append(_apply_override(values, override, tasks))
        except ValueError as error:
            problems.append(f"{path}: {error}")

    schema = _compose_schema(tuple(tasks.items()))
    _fill_empty_blocks(schema, values)
    if values.get("run") is None:
        values["run"] = _decode(path.stem)
    try:
        # Through JSON, because there strict types still let a list become a tuple.
        config = schema.model_validate_json(json.dumps(values), strict=True)
    except ValidationError as error:
        for details in error.errors(include_url=False):
            key, problem = _explain(details, _list_blocks(schema))
            from_override = any(f"{key}.".startswith(f"{other}.") for other in overridden)
            source = " (from the command line)" if from_override else ""
            problems.append(f"{path}: {problem}{source}")
    if problems:
        raise ConfigError(problems)
    return config


def config_to_dict(config: Config) -> dict:
    """Return the resolved config, all defaults included, as plain dicts, lists, numbers and strings."""
    return config.model_dump(mode="json")


def save_config(config: Config, path: str | Path) -> None:
    """Write the resolved config as YAML, whole or not at all; `load_config` makes an equal Config of it again.

    Raises OSError with the way out if it cannot be written.
    """
    text = yaml.dump(config_to_dict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    with whole_file(path) as file:
        file.write(text.encode("utf-8", errors="surrogateescape"))


class _Loader(yaml.SafeLoader):
    """SafeLoader that remembers keys given twice, reads `1e-3` as a number, and leaves dates as text.

    A number with an exponent and without a fraction is whole: `train.steps: 6e4` is what people write.
    """

    def __init__(self, stream):
        super().__init__(stream)
        self.duplicates: list[str] = []

    def compose_mapping_node(self, anchor):
        # here, and not where a mapping is constructed: by then PyYAML may have put in what `<<` refers to
        node = super().compose_mapping_node(anchor)
        first_line: dict[str, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key, str) or key == "<<":
                continue
            if key in first_line:
                self.duplicates.append(f"line {line}: key '{key}' is given again, first in line {first_line[key]}")
            first_line.setdefault(key, line)
        return node

    def construct_yaml_float(self, node):
        number = super().construct_yaml_float(node)
        return int(number) if "e" in node.value.lower() and number.is_integer() else number


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes a text which `_Loader` would read as a number."""


_EXPONENT = re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$")
# The resolver tables are shared with PyYAML's own classes until they are copied.
_Loader.yaml_implicit_resolvers = {
    letter: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for letter, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)
_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _EXPONENT, list("-+.0123456789"))


def _decode(argument: str) -> str:
    """An argument of the command line as UTF-8, which Python has not decoded where the locale knows only ASCII."""
    if argument.isascii() or not any("\udc80" <= character <= "\udcff" for character in argument):
        return argument
    return os.fsencode(argument).decode("utf-8", errors="replace")


def _parse_yaml(text: str) -> tuple[object, list[str]]:
    """Return the value of a YAML text and what is wrong with it; ValueError if it is no YAML at all."""
    text = text.removeprefix("\ufeff")
    try:
        loader = _Loader(text)  # refuses control characters before it is made
    except yaml.reader.ReaderError as error:
        before, character = text[: error.position], ord(text[error.position])
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        raise ValueError(f"line {line}: is not YAML: the character U+{character:04X} in column {column}") from error
    try:
        value = loader.get_single_data()
        # Through JSON and back, so that a block that YAML refers to twice (&name, *name) becomes two blocks, of which
        # an override changes one.
        return json.loads(json.dumps(value, default=str)), loader.duplicates
    except yaml.MarkedYAMLError as error:
        where = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{where}is not YAML: {error.problem}") from error
    except RecursionError as error:
        raise ValueError("is not YAML for a config: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise ValueError(f"is not YAML for a config: {error}") from error
    finally:
        loader.dispose()


def _apply_override(values: dict, override: str, tasks: dict[str, type[BaseModel]]) -> str:
    """Set one `key=value` in the nested dict `values` and return the dotted key."""
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or not all(parts):
        raise ValueError(f"override '{override}' must have the form key=value, as in train.steps=100")
    try:
        value, duplicates = _parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"override '{override}': {error}") from error
    if duplicates:
        raise ValueError(f"override '{override}': {duplicates[0]}")

    block = values
    for depth, part in enumerate(parts[:-1]):
        if block.get(part) is None:
            block[part] = {}
        block = block[part]
        if not isinstance(block, dict):
            parent = ".".join(parts[: depth + 1])
            raise ValueError(f"override '{override}': {parent} = {_show(block)} has no keys below it")
    if value is None and parts[:-1] == ["tasks"] and parts[-1] in tasks:
        block.pop(parts[-1], None)
    else:
        block[parts[-1]] = value
    return ".".join(parts)


@functools.cache
def _compose_schema(tasks: tuple[tuple[str, type[BaseModel]], ...]) -> type[Config]:
    """Return Config with the tasks' names and options in it; cached, as configs are equal only within one class."""
    names = [name for name, _ in tasks]
    given_tasks: dict[str, Any] = {name: (options | None, None) for name, options in tasks}
    block = create_model("Tasks", __base__=Closed, **given_tasks)
    given_groups: dict[str, Any] = dict.fromkeys(("encoder", *names), (Group | None, None))
    groups = create_model("Groups", __base__=Closed, **given_groups)

    def keep_given(chosen: BaseModel) -> dict[str, BaseModel]:
        return {name: getattr(chosen, name) for name in type(chosen).model_fields if getattr(chosen, name) is not None}

    def keep_chosen(chosen: BaseModel) -> dict[str, BaseModel]:
        given = keep_given(chosen)
        if not given:
            raise ValueError(f"must name at least one task to train: {', '.join(names)}")
        return given

    weights = Balancing.model_fields["weights"]
    balancing = create_model(
        "Balancing",
        __base__=Balancing,
        weights=(dict[Literal[*names], NonNegativeFloat], weights),  # type: ignore[valid-type]
    )
    protocol = compose_protocol(dict(tasks))
    evaluate = create_model("Evaluate", __base__=Evaluate, protocol=(protocol, Field(default_factory=protocol)))
    train = create_model(
        "Train", __base__=Train, groups=(Annotated[groups, AfterValidator(keep_given)], Field(default_factory=groups))
    )
    return create_model(
        "Config",
        __base__=Config,
        tasks=(Annotated[block, AfterValidator(keep_chosen)], Field(default_factory=block)),
        train=(train, Field(default_factory=train)),
        balancing=(balancing, Field(default_factory=balancing)),
        evaluate=(evaluate, Field(default_factory=evaluate)),
    )


@functools.cache
def _compose_protocol(blocks: tuple[tuple[str, type[BaseModel]], ...]) -> type[Protocol]:
    given: dict[str, Any] = {name: (block, Field(default_factory=block)) for name, block in blocks}
    return create_model("Protocol", __base__=Protocol, **given)


def compose_protocol(tasks: Mapping[str, type[BaseModel]]) -> type[Protocol]:
    """Protocol with the blocks of the tasks, which are given by name with their Options."""
    return _compose_protocol(tuple((name, getattr(options, "Protocol", Closed)) for name, options in tasks.items()))


def _fill_empty_blocks(schema: type[BaseModel], values: dict) -> None:
    """Let a block whose keys are all commented out (`train:` and nothing below it) mean its defaults."""
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel) and name in values:
            if values[name] is None:
                values[name] = {}
            if isinstance(values[name], dict):
                _fill_empty_blocks(field.annotation, values[name])


def _list_blocks(schema: type[BaseModel], prefix: str = "") -> dict[str, list[str]]:
    """Return the keys of each block of a schema by the block's dotted name; the outermost block is ""."""
    blocks = {prefix: list(schema.model_fields)}
    for name, field in schema.model_fields.items():
        for inner in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                blocks |= _list_blocks(inner, f"{prefix}.{name}".lstrip("."))
            elif typing.get_origin(inner) is Literal and typing.get_origin(field.annotation) is dict:
                blocks[f"{prefix}.{name}".lstrip(".")] = list(typing.get_args(inner))
    return blocks


def _explain(details: Mapping[str, Any], blocks: dict[str, list[str]]) -> tuple[str, str]:
    """Turn one of pydantic's errors into the dotted key and a line for the person who wrote the config."""
    wrong_name = details["loc"][-1:] == ("[key]",)
    location = [str(part) for part in details["loc"] if part != "[key]"]
    key = ".".join(location)
    if wrong_name:
        return key, f"{key}: unknown key; {_suggest(location, blocks)}"
    if details["type"] == "extra_forbidden" and (new := find_new_key(key)):
        return key, f"{key} = {_show(details['input'])}: this key is called {new} now"
    if details["type"] == "extra_forbidden":
        return key, f"{key} = {_show(details['input'])}: unknown key; {_suggest(location, blocks)}"
    if details["type"] == "missing":
        return key, f"{key}: must be given"
    if details["type"] in ("model_type", "dict_type"):
        keys = ", ".join(blocks.get(key, []))
        return key, f"{key} = {_show(details['input'])}: must be a block of keys" + (f": {keys}" if keys else "")
    given = _show(details["input"])
    if key == "run" and details["type"] == "string_pattern_mismatch":
        advice = "must be a name below runs/, without a leading dot or slash; for another folder give --run FOLDER"
        return key, f"run = {given}: {advice}"
    if key == "train.device" and details["type"] == "string_type":
        number = details["input"] if type(details["input"]) is int and details["input"] >= 0 else 0
        return key, f"train.device = {given}: must be auto, cpu or the name of a GPU; write cuda:{number}"
    if details["type"] == "string_type" and isinstance(details["input"], (bool, int, float)):
        return key, f'{key} = {given}: must be text, for which YAML needs quotes: "{given}", in a shell \'"{given}"\''
    message = details["msg"].removeprefix("Value error, ").replace("valid array", "list")
    message = re.sub(r"^\w+ should ", "must ", message)
    return key, f"{key} = {given}: {message}"


def _suggest(location: list[str], blocks: dict[str, list[str]]) -> str:
    """The key that was probably meant: this project's word for another's, a similar one in this block, the same or a
    similar one elsewhere, else all of the block."""
    if answer := find_other_word(".".join(location)):
        return answer
    *parents, name = location
    block = ".".join(parents)
    near = difflib.get_close_matches(name, blocks.get(block, []), n=1)
    if near:
        return f"did you mean '{near[0]}'?"
    for matches in (lambda key: key == name, lambda key: difflib.get_close_matches(name, [key], cutoff=0.8)):
        elsewhere = [f"{other}.{key}".lstrip(".") for other, keys in blocks.items() for key in keys if matches(key)]
        if elsewhere:
            # the outermost alone: blocks that are alike, one for each task, would make a long list
            least = min(key.count(".") for key in elsewhere)
            return f"did you mean {' or '.join(repr(key) for key in elsewhere if key.count('.') == least)}?"
    return f"allowed here: {', '.join(blocks.get(block, [])) or 'nothing'}"


def _show(value: object) -> str:
    """Return a value as YAML would write it on one line, shortened."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_none=True)
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= LONGEST_VALUE else text[: LONGEST_VALUE - 3] + "..."
