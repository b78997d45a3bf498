"""The options of every task in a config, and the protocol it is scored by.

They are beside the tasks, not in their files, because a config is checked before PyTorch is loaded.
"""

import difflib
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)

from a2d2.classes import OBJECT_CLASSES, OBJECT_GROUPINGS, find_object_class


class Closed(BaseModel):
    """Base of blocks of options: unknown keys are errors, defaults are validated, and values cannot be changed."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False, frozen=True)


class TaskProtocol(Closed):
    """Base of what each task is scored by, whatever a run was trained with."""


class LearningSteps(Closed):
    """When a task learns: the steps from `from_step`, counted from 0, up to but without `until_step`."""

    from_step: NonNegativeInt = Field(0, description="first step in which the task is trained, counted from 0")
    until_step: PositiveInt | None = Field(None, description="first step in which it is not any more; null: none")

    @field_validator("until_step")
    @classmethod
    def check_order(cls, until, info):
        if until is not None and until <= info.data.get("from_step", 0):
            raise ValueError("must be after from_step")
        return until


class PseudoOptions(Closed):
    """Base of what a task learns of a teacher's prediction. `weighting`: what is learned counts alike, or by how sure
    the teacher is, from 0 to 1."""

    weighting: Literal["equal", "confidence"] = Field(
        "equal", description="equal: all that passes the threshold counts alike; confidence: by how sure the teacher is"
    )


class TaskOptions(Closed):
    """Base of each task's options. They limit training only; `Protocol` is the block that limits what is scored."""

    Protocol: ClassVar[type[TaskProtocol]] = TaskProtocol
    train: LearningSteps = Field(LearningSteps(), description="the steps in which the task is trained")


class ClassTaskOptions(TaskOptions):
    """Of tasks whose labels show classes, or ranges of a value, of which some are rare."""

    oversample_below: float | None = Field(
        None,
        gt=0,
        le=1,
        description="draw frames more often that show a class (steering: a range of angles) which a smaller share of "
        "the frames shows: sqrt(this / its share) times; null: all alike",
    )


class HeadOptions(Closed):
    """Options that all heads have."""

    stop_gradient: bool = Field(False, description="train the head without changing encoder and neck")
    adapter: bool = Field(False, description="put a small residual layer between the features and the head")


class SegmentationHeadOptions(HeadOptions):
    reads: tuple[str, ...] = Field(("neck.4",), description="features the head reads, by name and stride")
    width: PositiveInt = Field(128, description="channels of its convolutions")
    layers: PositiveInt = Field(1, description="3x3 convolutions on the summed levels")


class SegmentationPseudo(PseudoOptions):
    threshold: float = Field(0.9, ge=0, lt=1, description="pixels with a smaller probability are not learned")


OwnClasses = dict[str, tuple[int, int, int]]
"""Names and colours of the classes of a dataset that is not A2D2, by id; what `root` becomes when a run starts."""


class SegmentationProtocol(TaskProtocol):
    classes: Literal["paper", "all"] | OwnClasses | None = Field(
        None, description="the grouping that is scored; null: the run's own"
    )


class SegmentationOptions(ClassTaskOptions):
    Protocol = SegmentationProtocol
    classes: Literal["paper", "all", "root"] | OwnClasses = Field(
        "paper", description="paper: the authors' 19 classes; all: A2D2's 38; root: those that the datasets have"
    )
    class_balance: float = Field(
        0.0,
        ge=0,
        le=1,
        description="weight classes by (share of the training pixels, at least 1e-3) ** -class_balance; "
        "0: equal weights",
    )
    lovasz: NonNegativeFloat = Field(0.0, description="weight of the Lovasz-Softmax term beside the cross-entropy")
    dice: NonNegativeFloat = Field(0.0, description="weight of the Dice term beside the cross-entropy")
    pseudo: SegmentationPseudo = SegmentationPseudo()
    head: SegmentationHeadOptions = SegmentationHeadOptions()


class DepthHeadOptions(HeadOptions):
    reads: tuple[str, ...] = Field(("neck.4",), description="features the head reads, by name and stride")
    width: PositiveInt = Field(64, description="channels of its convolutions")
    layers: PositiveInt = Field(2, description="number of residual blocks")
    bins: NonNegativeInt = Field(0, description="0: regress log-depth; else a softmax over so many log-depths")


class DepthPseudo(PseudoOptions):
    threshold: PositiveFloat = Field(
        2.0,
        description="metres; pixels on which predictions of the picture and its mirror image differ by more are not "
        "learned",
    )


class DepthProtocol(TaskProtocol):
    cap: PositiveFloat = Field(80.0, description="metres; farther points are not scored")


class DepthOptions(TaskOptions):
    Protocol = DepthProtocol
    cap: PositiveFloat = Field(80.0, description="metres; farther points are not used in training")
    silog_lambda: float = Field(
        0.5, ge=0, le=1, description="1: the loss ignores the scale of an image; 0: it does not"
    )
    pseudo: DepthPseudo = DepthPseudo()
    head: DepthHeadOptions = DepthHeadOptions()


class DetectionHeadOptions(HeadOptions):
    reads: tuple[str, ...] = Field(
        ("neck.8", "neck.16", "neck.32", "neck.64", "neck.128"), description="features the head reads"
    )
    width: PositiveInt = Field(128, description="channels of its two towers")
    layers: PositiveInt = Field(4, description="convolutions of each tower")


def check_classes(value: Any) -> Any:
    """The name of a grouping, "root", the names of another dataset's classes, or disjoint, non-empty groups of A2D2's
    classes; ValueError for anything else."""
    if isinstance(value, str) and value in (*OBJECT_GROUPINGS, "root"):
        return value
    if isinstance(value, list | tuple) and value and all(isinstance(name, str) for name in value):
        if len(set(value)) < len(value):
            raise ValueError("names a class twice")
        return tuple(value)
    if not (isinstance(value, dict) and value and all(isinstance(group, list | tuple) for group in value.values())):
        raise ValueError(f"must be {', '.join(OBJECT_GROUPINGS)}, or a mapping {{group: [class, ...], ...}}, or root")
    group_of: dict[int, str] = {}
    for group, members in value.items():
        if not members:
            raise ValueError(f"group {group} is empty: name its classes, or leave it out")
        for member in members:
            found = find_object_class(str(member))
            if found is None:
                near = difflib.get_close_matches(str(member), OBJECT_CLASSES, n=1)
                meant = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(OBJECT_CLASSES)}"
                raise ValueError(f"group {group} has the unknown class '{member}'; {meant}")
            if found in group_of:
                raise ValueError(f"'{member}' is in {group_of[found]} and again in {group}: leave it in one of them")
            group_of[found] = group
    return {group: tuple(members) for group, members in value.items()}


Classes = Annotated[str | tuple[str, ...] | dict[str, tuple[str, ...]], BeforeValidator(check_classes)]


class DetectionPseudo(PseudoOptions):
    targets: Literal["dense", "boxes"] = Field(
        "dense",
        description="dense: what the teacher says at every location (arXiv 2207.02541); boxes: its boxes after "
        "suppression",
    )
    learned_share: float = Field(
        0.01,
        gt=0,
        le=1,
        description="dense: so many of the locations, those with the highest scores, are learned; the "
        "others are background",
    )
    threshold: float = Field(0.5, ge=0, lt=1, description="boxes: those with a lower calibrated score are not learned")
    ignored_from: float = Field(
        0.2,
        ge=0,
        le=1,
        description="boxes: those that reach this score and not the threshold are ignored, and no background",
    )


class DetectionProtocol(TaskProtocol):
    classes: Classes | None = Field(None, description="the classes that are scored; null: the run's own")
    min_size: NonNegativeFloat = Field(8.0, description="pixels; boxes with a shorter side are not scored")
    min_visible: float = Field(0.1, ge=0, le=1, description="boxes with a smaller visible share are not scored")


class DetectionOptions(ClassTaskOptions):
    Protocol = DetectionProtocol
    box_coder: Literal["dense", "grid"] = Field(
        "dense", description="dense: FCOS, a prediction at every location; grid: the thesis's coarse grid of boxes"
    )
    classes: Classes = Field(
        "merged",
        description="all: A2D2's 14; merged: five groups; object: one class; root: those that the datasets have; or "
        "{group: [class, ...], ...}, where boxes of classes in no group are ignored",
    )
    min_size: NonNegativeFloat = Field(8.0, description="pixels; boxes with a shorter side are ignored in training")
    min_visible: float = Field(0.1, ge=0, le=1, description="boxes with a smaller visible share are, too")
    max_boxes: PositiveInt = Field(
        64, description="training learns so many boxes of a frame, the largest, and ignores others"
    )
    score_threshold: float = Field(0.05, ge=0, le=1, description="predictions with a lower score are dropped")
    nms_threshold: float = Field(
        0.6, ge=0, le=1, description="IoU above which the lower-scoring of two predictions of a class is dropped"
    )
    pseudo: DetectionPseudo = DetectionPseudo()
    head: DetectionHeadOptions = DetectionHeadOptions()

    @field_validator("head")
    @classmethod
    def check_head(cls, head, info):
        if info.data.get("box_coder") == "grid" and head != DetectionHeadOptions():
            raise ValueError("is for box_coder: dense; the box grid's head has no options, so leave it out")
        return head


class SteeringHeadOptions(HeadOptions):
    reads: tuple[str, ...] = Field(("encoder.32",), description="features the head reads, by name and stride")
    grid: tuple[PositiveInt, PositiveInt] = Field((4, 8), description="rows and columns of the pooled grid")
    width: PositiveInt = Field(64, description="channels kept of each cell")
    hidden: PositiveInt = Field(256, description="units of each hidden layer")
    layers: PositiveInt = Field(1, description="hidden layers")


class SteeringPseudo(PseudoOptions):
    threshold: PositiveFloat = Field(
        15.0,
        description="degrees; frames on which predictions of the picture and its mirror image, or of several "
        "teachers, differ by more are not learned",
    )


class SteeringOptions(ClassTaskOptions):
    horizon: PositiveInt = Field(1, description="number of bus samples to predict, from the one at the frame's time on")
    loss: Literal["smooth_l1", "l1"] = Field("smooth_l1", description="of the angle divided by scale_deg")
    scale_deg: PositiveFloat | None = Field(
        None, description="degrees; null: the standard deviation of the training labels"
    )
    pseudo: SteeringPseudo = SteeringPseudo()
    head: SteeringHeadOptions = SteeringHeadOptions()


OPTIONS: dict[str, type[TaskOptions]] = {
    "segmentation": SegmentationOptions,
    "depth": DepthOptions,
    "detection": DetectionOptions,
    "steering": SteeringOptions,
}
