"""Many trainings in one pair of ranks, for test_ranks.py: started with the variables that torchrun sets, and with a
JSON file as its only argument: "cases", lists of [run folder, options], and "small", where to save small networks."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from small_net import NAMES, build_net, build_update, count_cycle, make_batch

import train
from tasks.options import OPTIONS
from training.config import Train, load_config
from training.distributed import Ranks, join_ranks
from training.stopping import StopFlag
from training.updates import CycleUpdate


def run_all(cases: list, config: Path, ranks: Ranks) -> None:
    stop = StopFlag()
    for folder, options in cases:
        train.train(load_config(config, options, OPTIONS), Path(folder), True, stop, ranks)


def run_small(path: Path, ranks: Ranks) -> None:
    """Small networks after 20 cycles of two micro-batches, of which the second, and so the second of two ranks, has
    labels of "b" in every third cycle, and none at all in the others."""
    states = {}
    for method in ("sum", "mgda", "pcgrad"):
        options = Train(steps=20, schedule={"warmup_steps": 0}, optimizer={"lr": 0.01, "clip": 1.0})
        update = build_update(CycleUpdate, options, build_net(), ranks=ranks, method=method)
        torch.manual_seed(0)
        for step in range(20):
            cycle = []
            for labelled in ({"a": [True, False], "c": [True, True]}, {"b": [step % 3 == 0] * 2}):
                target = {"value": torch.rand(2).double(), "weight": torch.tensor([1, 2])}
                cycle.append(make_batch(torch.rand(2, 3, 2, 2).double(), target, labelled, [f"{step}"] * 2))
            update.step(step, cycle[ranks.rank :: ranks.world], count_cycle(NAMES, cycle))
        states[method] = update.net.state_dict()
    if ranks.first:
        torch.save(states, path)


if __name__ == "__main__":
    content = json.loads(Path(sys.argv[1]).read_text())
    group = join_ranks("cpu", 120.0)
    run_small(Path(content["small"]), group)
    run_all(content["cases"], Path(content["config"]), group)
    group.close()
