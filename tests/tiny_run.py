"""A training of four steps on the hand-made preprocessed dataset, in the process of the tests."""

import json
import signal

import pytest
import torch
import yaml
from torch.utils._pytree import tree_flatten_with_path

import train
from training.checkpoint import load_newest_checkpoint, load_weights

CONFIG = {
    "data": {"split": "by_scene", "workers": 0, "augment": {"scale": [1.0, 1.3], "color": 0.2}},
    "model": {
        "encoder": {"name": "test_resnet", "pretrained": False, "norm": "group"},
        "neck": {"width": 32, "repeats": 1},
    },
    "tasks": {
        "segmentation": {"head": {"width": 32}},
        "depth": {"head": {"width": 16, "layers": 1}},
        "detection": {"head": {"width": 32, "layers": 1}},
        "steering": {},
    },
    "train": {
        "steps": 4,
        "micro_batch": 1,
        "schedule": {"warmup_steps": 2},
        "ema": {"decay": 0.9, "ramp": 2},
        "evaluate_every": 2,
        "save_every": 3,
        "log_every": 1,
    },
    "balancing": {"normalise": "init"},
    "log": {"tensorboard": False},
}


def write_config(path, root, **data):
    """Write a config that trains on `root`, with other values of its `data` block; return its path."""
    path.write_text(yaml.safe_dump(CONFIG | {"data": CONFIG["data"] | {"roots": [str(root)]} | data}))
    return path


def run_train(patch, config, folder, *options):
    patch.setattr("sys.argv", ["train.py", "--config", str(config), "--run", str(folder), *options])
    return train.main()


def make_run(folder, *options, name="run"):
    """Train on the hand-made dataset `folder`/root; return the run folder, `folder`/`name`."""
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, write_config(folder / "tiny.yaml", folder / "root"), folder / name, *options) == 0
    return folder / name


def stop_at_check(patch, number):
    """Let a real signal arrive just before the flag is looked at for the n-th time."""
    looked = train.StopFlag.check
    calls = []

    def check(self):
        calls.append(1)
        if len(calls) == number:
            signal.raise_signal(signal.SIGTERM)
        looked(self)

    patch.setattr(train.StopFlag, "check", check)


def read_log(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def are_same_weights(first, second):
    """The best weights, and every tensor of the newest checkpoint: a later step may differ, though the best do not."""
    ours, theirs = (load_weights(folder / "best.safetensors") for folder in (first, second))
    assert ours[0].keys() == theirs[0].keys()
    assert ours[1] == theirs[1]
    checkpoints = [load_newest_checkpoint(folder / "checkpoints") for folder in (first, second)]
    assert checkpoints[0][0] == checkpoints[1][0]
    leaves = [tree_flatten_with_path(checkpoint)[0] for _, checkpoint in checkpoints]
    assert [path for path, _ in leaves[0]] == [path for path, _ in leaves[1]]
    pairs = [(ours[0][name], theirs[0][name]) for name in theirs[0]]
    pairs += [(a, b) for (_, a), (_, b) in zip(*leaves, strict=True) if isinstance(a, torch.Tensor)]
    return all(torch.equal(a, b) for a, b in pairs)
