"""Keys and features with new names: one table for reading older weights files and for errors about older configs."""

from typing import Any

RENAMED_KEYS = {"tasks.*.head.depth": "layers", "tasks.*.codec": "box_coder"}
"""Old dotted key (* is any name) -> the last name of the new key."""

RENAMED_FEATURES = {"trunk": "backbone"}
"""Old origin of a feature -> new origin: "trunk.8" is "backbone.8" now."""


OTHER_WORDS = {
    "batch_size": "a step is train.cycle micro-batches of each task, with train.micro_batch frames",
    "epochs": "there are no epochs, because the tasks have different numbers of labels; train.steps counts updates",
    "num_epochs": "there are no epochs, because the tasks have different numbers of labels; train.steps counts updates",
    "max_epochs": "there are no epochs, because the tasks have different numbers of labels; train.steps counts updates",
    "max_steps": "it is called train.steps",
    "iterations": "it is called train.steps",
    "accumulate": "it is called train.cycle",
    "gradient_accumulation": "it is called train.cycle",
    "backbone": "it is called model.encoder.name",
    "arch": "it is called model.encoder.name",
    "learning_rate": "it is called train.optimizer.lr",
    "wd": "it is called train.optimizer.weight_decay",
    "grad_clip": "it is called train.optimizer.clip",
    "warmup": "it is called train.schedule.warmup_steps",
    "amp": "it is called train.precision: auto, fp32, bf16 or fp16",
    "fp16": "it is called train.precision: auto, fp32, bf16 or fp16",
    "gpu": "it is called train.device, as in cuda:0",
    "gpus": "it is called train.device, as in cuda:0",
    "num_workers": "it is called data.workers",
    "root": "it is called data.roots, a list of preprocessed datasets",
    "dataset": "it is called data.roots, a list of preprocessed datasets",
    "path": "it is called data.roots, a list of preprocessed datasets",
    "image_size": "it is called model.input_size: [width, height]",
    "img_size": "it is called model.input_size: [width, height]",
    "num_classes": "it follows from tasks.segmentation.classes and tasks.detection.classes",
    "loss_weights": "it is called balancing.weights",
    "checkpoint": "to go on with a run: --resume; to start from its weights: train.init",
    "resume": "it is the flag --resume; to start another run from weights: train.init",
    "pretrained_weights": "of the encoder: model.encoder.weights; of a whole run: train.init",
}
"""Words of other projects -> what they are here, for errors about unknown keys."""


def find_new_key(key: str) -> str | None:
    """The new dotted key for an old one; None for a key that was not renamed."""
    parts = key.split(".")
    for before, name in RENAMED_KEYS.items():
        pattern = before.split(".")
        if len(parts) == len(pattern) and all(one in ("*", part) for one, part in zip(pattern, parts, strict=True)):
            return ".".join([*parts[:-1], name])
    return None


def rename_all(content: Any, key: str = "") -> Any:
    """The header of an older weights file (dicts, lists, plain values) with the new names."""
    if isinstance(content, dict):
        renamed = {}
        for name, value in content.items():
            full = f"{key}.{name}" if key else name
            new = find_new_key(full)
            renamed[name if new is None else new.rsplit(".", 1)[1]] = rename_all(value, full)
        return renamed
    if isinstance(content, list):
        return [rename_all(value, key) for value in content]
    if isinstance(content, str) and key.endswith(".reads"):
        origin, _, stride = content.partition(".")
        return f"{RENAMED_FEATURES.get(origin, origin)}.{stride}"
    return content
