"""Many trainings in one pair of ranks, for test_ranks.py: started with the variables that torchrun sets, and a JSON
file of [run folder, options] as its only argument. Prints nothing but errors."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from tasks.options import OPTIONS
from training.config import load_config
from training.distributed import Ranks, join_ranks
from training.stopping import StopFlag


def run_all(cases: list, config: Path, ranks: Ranks) -> None:
    stop = StopFlag()
    for folder, options in cases:
        train.train(load_config(config, options, OPTIONS), Path(folder), True, stop, ranks)


if __name__ == "__main__":
    content = json.loads(Path(sys.argv[1]).read_text())
    group = join_ranks("cpu", 120.0)
    run_all(content["cases"], Path(content["config"]), group)
    group.close()
