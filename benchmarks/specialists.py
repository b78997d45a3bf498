"""Each task by the shared network's head alone and by its specialist, after the same number of frames.

    python benchmarks/specialists.py [--config FILE ...] [--output runs/benchmarks/specialists]

Trains both on the synthetic set of `make demo`, from scratch and by the demo's recipe, with one task at a time, and
scores them on its test frames. Unfinished runs are resumed. Some minutes each on two CPU cores, a quarter hour for
the U-Net. Images are small and frames few: the table shows that all networks learn, not which is better after full
training.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import yaml

from evaluate import Scores, choose_protocol, evaluate
from experiment import KINDS, load_trained, load_trained_data
from tasks import TASKS
from train import train
from training.config import Config, ConfigError, load_config

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "configs" / "demo.yaml"
SPECIALISTS = sorted((ROOT / "configs" / "specialist").glob("*.yaml"))
OPTIONS = {name: task.Options for name, task in TASKS.items()}


def flatten(block: dict[str, Any], key: str) -> Iterator[str]:
    """A block of a config as overrides."""
    for name, value in block.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{key}.{name}")
        else:
            yield f"{key}.{name}={'null' if value is None else value}"


def make_configs(specialist: Path) -> tuple[str, dict[str, Config]]:
    """The specialist's task, and the configs of the shared network and the specialist for it, by the demo's recipe."""
    demo = yaml.safe_load(DEMO.read_text(encoding="utf-8"))
    shipped = load_config(specialist, [], OPTIONS)
    (task,) = shipped.tasks
    own = {name: value for name, value in demo["tasks"][task].items() if name != "head"}
    scoring = [*flatten(demo["evaluate"]["protocol"], "evaluate.protocol")]
    recipe = [*flatten(demo["data"], "data"), *flatten(demo["train"], "train"), *flatten(own, f"tasks.{task}")]
    untrained = (
        ["model.encoder.pretrained=false", "model.encoder.norm=group"] if KINDS[shipped.model.kind].encoder else []
    )
    others = [f"tasks.{name}=null" for name in demo["tasks"] if name != task]
    return task, {
        "shared": load_config(DEMO, others, OPTIONS),
        shipped.model.kind: load_config(specialist, [*recipe, *scoring, "train.cycle=1", *untrained], OPTIONS),
    }


def score(folder: Path, subset: str) -> tuple[Scores, int]:
    """A run's scores on its own data, and its parameters."""
    trained = load_trained(folder, torch.device("cpu"))
    data = load_trained_data(trained)
    protocol = choose_protocol({trained.name: trained}, {})
    frames, device = data.subsets[subset], torch.device("cpu")
    scores = evaluate(trained.net, trained.tasks, frames, data, trained.size, device, protocol=protocol)
    return scores, sum(parameter.numel() for parameter in trained.net.parameters())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--config", nargs="+", type=Path, default=SPECIALISTS, help="specialists (default: all shipped)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/specialists"), help="folder of the runs")
    arguments = parser.parse_args()
    lines = [
        "| task | network | parameters, M | frames seen | metric | score | constant |",
        "|---|---|---|---|---|---|---|",
    ]
    try:
        for path in arguments.config:
            task, configs = make_configs(path.resolve())
            for name, config in configs.items():
                folder = arguments.output / f"{task}_{name}"
                train(config, folder, resume=True)
                scores, parameters = score(folder, "test")
                found, seen = scores[task], config.train.steps * config.train.micro_batch
                metric = f"{found['headline']} ({found['better']} is better)"
                lines.append(
                    f"| {task} | {name} | {parameters / 1e6:.2f} | {seen} | {metric} | {found['score']:.3g} "
                    f"| {found['constant']:.3g} |"
                )
    except ConfigError as error:
        print(f"specialists: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"specialists: {error}", file=sys.stderr)
        return 1
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
