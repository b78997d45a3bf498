"""Keys and features with new names: for reading older weights files, and for errors about older configs and words."""

from typing import Any

RENAMED_KEYS = {"tasks.*.head.depth": "layers", "tasks.*.codec": "box_coder"}
"""Old dotted key (* is any name) -> the last name of the new key."""

RENAMED_FEATURES = {"trunk": "backbone"}
"""Old origin of a feature -> new origin: "trunk.8" is "backbone.8" now."""

_A_STEP = "each after train.cycle micro-batches of each task"
_EPOCHS = f"there are no epochs, as the tasks have different numbers of labels; train.steps counts updates, {_A_STEP}"
_MICRO_BATCH = (
    "it is called train.micro_batch, when scoring evaluate.micro_batch; a step is train.cycle of them for each task"
)
_STEPS = f"it is called train.steps: updates of the weights, {_A_STEP}"
_ENCODER = "it is called model.encoder.name"
_PRECISION = "it is called train.precision: auto, fp32, bf16 or fp16"
_DEVICE = "it is called train.device, as in cuda:0; a run takes one GPU"
_ROOTS = "it is called data.roots, a list of preprocessed datasets"
_SIZE = "it is called model.input_size: [width, height]"
_OPTIMIZER = "it is always AdamW (for update: async Adam), with the options in train.optimizer"
_FOLDER = "a run's name below runs/ is run; for another folder give the flag --run FOLDER"

OTHER_WORDS = {
    "batch_size": _MICRO_BATCH,
    "batch": _MICRO_BATCH,
    "epochs": _EPOCHS,
    "epoch": _EPOCHS,
    "num_epochs": _EPOCHS,
    "max_epochs": _EPOCHS,
    "max_steps": _STEPS,
    "max_iter": _STEPS,
    "iterations": _STEPS,
    "accumulate": "it is called train.cycle",
    "gradient_accumulation": "it is called train.cycle",
    "backbone": _ENCODER,
    "arch": _ENCODER,
    "pretrained": "it is called model.encoder.pretrained; to start from weights of your own: train.init",
    "learning_rate": "it is called train.optimizer.lr; for update: async each group has its own lr",
    "wd": "it is called train.optimizer.weight_decay",
    "optimizer": _OPTIMIZER,
    "optimizer.name": _OPTIMIZER,
    "grad_clip": "it is called train.optimizer.clip",
    "warmup": "it is called train.schedule.warmup_steps",
    "amp": _PRECISION,
    "mixed_precision": _PRECISION,
    "fp16": _PRECISION,
    "gpu": _DEVICE,
    "gpus": _DEVICE,
    "cuda": _DEVICE,
    "num_workers": "it is called data.workers",
    "data.path": _ROOTS,
    "root": _ROOTS,
    "dataset": _ROOTS,
    "image_size": _SIZE,
    "img_size": _SIZE,
    "num_classes": "it follows from tasks.segmentation.classes and tasks.detection.classes",
    "loss_weights": "it is called balancing.weights",
    "checkpoint": "to go on with a run: --resume; to start from its weights: train.init",
    "resume": "it is the flag --resume; to start another run from weights: train.init",
    "pretrained_weights": "of the encoder: model.encoder.weights; of a whole run: train.init",
    "output_dir": _FOLDER,
    "save_dir": _FOLDER,
}
"""Words of other projects -> what they are here, for errors about unknown keys; with a dot: only below that block."""


def find_other_word(key: str) -> str | None:
    """What another project's word is called here, for the end of a dotted key; None for a word without an answer."""
    parts = key.lower().replace("-", "_").split(".")
    for start in range(len(parts)):
        if answer := OTHER_WORDS.get(".".join(parts[start:])):
            return answer
    return None


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
