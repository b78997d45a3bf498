"""draft"""

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
from _fake_gpu import CountKernels, fake, make_batch
from networks import find_micro_batch, find_size, prepare_tasks
from torch._subclasses import FakeTensorMode

from experiment import build_network
from train import build_update

ROOT = Path(__file__).resolve().parent.parent


def count(path, streams, overrides=()):
    from tasks.options import OPTIONS
    from training.config import load_config

    config = load_config(path, list(overrides), OPTIONS)
    size, tasks = find_size(config), prepare_tasks(config)
    net = (
        build_network(config.model, tasks, size, load_pretrained=False)
        .train()
        .to(memory_format=torch.channels_last)
        .to("meta")
    )
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    batch = make_batch(tasks, size, find_micro_batch(config))
    with mode:
        net.to_empty(device="cpu")
        update = build_update(
            config,
            net,
            tasks,
            torch.device("cpu"),
            partial(torch.autocast, "cpu", dtype=torch.bfloat16),
            torch.channels_last,
        )
        cycle = [batch | {key: fake(batch[key], mode) for key in ("image", "targets")} for _ in range(streams)]
        with CountKernels():
            update.step(0, cycle, dict.fromkeys(tasks, 1))
        counter = CountKernels()
        with counter:
            update.step(1, cycle, dict.fromkeys(tasks, 1))
    return counter


if __name__ == "__main__":
    c = count(ROOT / "configs/symmetric.yaml", 4, sys.argv[1:])
    print(sum(c.kernels.values()), c.waits)
    for n, k in c.kernels.most_common(45):
        print(k, n)
