"""Parameters, operations and memory of each network by module, and of the shared network against the specialists.

    python benchmarks/networks.py [--config FILE ...] [--output runs/benchmarks/networks]
    python benchmarks/networks.py --speed [--repeats 5]

By default every config in configs/ is counted. Nothing is computed for it: the networks run on tensors without content,
by the rules for a GPU with bfloat16 (float32 where the config asks for it), so that no GPU is needed and a network
takes a second or two.

GMAC: 10^9 multiply-accumulates of a forward pass of one image; a count of FLOPs is twice that.
saved: MiB that one more image in a micro-batch adds to what is kept for the backward pass: what autograd saves, each
storage once and without parameters and their bfloat16 copies; the features that the heads read; what the loss saves.
training: GiB for weights, gradients, the optimizer's two means, EMA weights, bfloat16 copies, one micro-batch, and
what is saved of it with the head that needs most memory, because one head's graph exists at a time. Temporary memory of
the backward pass and unused memory of the allocator are not counted; --memory measures a real step on a GPU.
--speed times the forward pass of the shared network against the specialists one after the other, in turns.
"""

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from _fake_gpu import autocast_as_on_gpu, make_batch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from experiment import WrongUseError, build_network, build_tasks, pick_device
from tasks import TASKS
from tasks.task import Task
from train import build_update
from training.config import Config, ConfigError, load_config
from training.parts import recompute_neck

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT / "configs" / "symmetric.yaml"
SPECIALISTS = ROOT / "configs" / "specialist"
MOST_FLOPS, MOST_PARAMETERS, LEAST_SPEEDUP = 0.2, 0.4, 4.0
MOST_BYTES = 12e9  # of the GPU that the default config must fit


@dataclass
class Module:
    """Of the encoder, the neck or one head: `saved` in bytes an image, `fixed` in bytes whatever the micro-batch."""

    parameters: int
    macs: int
    saved: int
    fixed: int


@dataclass
class Network:
    """A config's network on paper; `size` is (width, height), `training` and `measured` are bytes."""

    config: str
    kind: str
    precision: str
    size: tuple[int, int]
    micro_batch: int
    parts: dict[str, Module] = field(default_factory=dict)
    heads: tuple[str, ...] = ()
    training: int = 0
    measured: int | None = None

    def total(self, quantity: str) -> int:
        return sum(getattr(part, quantity) for part in self.parts.values())


# ---------------------------------------------------------------- networks


def read_config(path: Path) -> Config:
    return load_config(path, [], {name: task.Options for name, task in TASKS.items()})


def find_size(config: Config) -> tuple[int, int]:
    """(width, height) of the network's input; if the config leaves it to the data, read from the folder's name."""
    if config.model.input_size:
        return config.model.input_size
    named = re.fullmatch(r"(\d+)x(\d+)", Path(config.data.roots[0]).name)
    if not named:
        raise WrongUseError(f"the size of {config.data.roots[0]} is not in its name: give model.input_size")
    return int(named[1]), int(named[2])


def find_micro_batch(config: Config) -> int:
    """Frames in the largest micro-batch."""
    given = config.train.micro_batch
    return max(given.values()) if isinstance(given, dict) else given


def choose_precision(config: Config) -> str:
    """What `train.precision` comes to on a GPU that has bfloat16; fp16 takes as much room."""
    return "fp32" if config.train.precision == "fp32" else "bf16"


def prepare_tasks(config: Config) -> dict[str, Task]:
    """The tasks with label statistics that come from no labels at all."""
    tasks = build_tasks(config.tasks)
    for task in tasks.values():
        task.collect_statistics([])
    return tasks


# ---------------------------------------------------------------- counting


class Ledger:
    """Storages that are kept for the backward pass, each counted once; those of `known` tensors are not counted."""

    def __init__(self, known: list[Tensor]):
        self.seen = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in known}
        self.bytes = 0

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage  # kept, so that no other storage gets its address
            self.bytes += storage.nbytes()
        return tensor


def count_loss(task: Task, output: Any, size: tuple[int, int]) -> int:
    """Bytes that the loss of one image keeps; the output is replaced by zeros of its shape, the label is blank."""
    zeros = tree_map(
        lambda leaf: torch.zeros(1, *leaf.shape[1:], requires_grad=True) if isinstance(leaf, Tensor) else leaf, output
    )
    ledger = Ledger([leaf for leaf in tree_leaves(zeros) if isinstance(leaf, Tensor)])
    with saved_tensors_hooks(ledger.add, lambda tensor: tensor):
        task.loss(zeros, task.collate([task.prepare_loss(task.blank(size))]))
    return ledger.bytes


def count_forward(
    net: nn.Module, batch: int, size: tuple[int, int], precision: str, mode: FakeTensorMode
) -> tuple[dict[str, Module], dict[str, Any]]:
    """Module -> the cost of a micro-batch in it, `saved` for all its images; head -> its output, without content."""
    ledger = Ledger([*net.parameters(), *net.buffers()])
    parts, outputs = {}, {}

    def run(part: nn.Module, work: Callable, *arguments: Any) -> tuple[Any, Module]:
        before = ledger.bytes
        hooks = saved_tensors_hooks(ledger.add, lambda tensor: tensor)
        with autocast_as_on_gpu(precision == "bf16"), FlopCounterMode(display=False) as counter, hooks:
            result = work(*arguments)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                ledger.add(leaf)
        parameters = sum(parameter.numel() for parameter in part.parameters())
        return result, Module(parameters, counter.get_total_flops() // 2, ledger.bytes - before, 0)

    with mode:
        features, part = run(net.encoder, net.encoder, torch.empty(batch, 3, size[1], size[0], device="cuda"))
        backbone = next(iter(features)).partition(".")[0]  # features are named by where they come from
        parts[backbone] = part
        if {name for head in net.heads.values() for name in head.reads} - features.keys():
            more, parts["neck"] = run(net.neck, net.neck, features)
            features |= more
        leaves = {name: feature.detach().requires_grad_() for name, feature in features.items()}
        for name, head in net.heads.items():
            outputs[name], parts[name] = run(head, net.run_head, name, leaves, (size[1], size[0]))
    return parts, outputs


def measure(path: Path) -> Network:
    """Everything about a config's network that can be counted."""
    config = read_config(path)
    size, tasks = find_size(config), prepare_tasks(config)
    net = build_network(config.model, tasks, size, load_pretrained=False).train().to("meta")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        net.to_empty(device="cuda")
    if config.train.recompute:
        recompute_neck(net)
    precision = choose_precision(config)
    (once, outputs), (twice, _) = (count_forward(net, batch, size, precision, mode) for batch in (1, 2))
    network = Network(name_config(path), config.model.kind, precision, size, find_micro_batch(config))
    network.heads = tuple(net.heads)
    for name, part in once.items():
        more = twice[name].saved - part.saved
        loss = count_loss(tasks[name], outputs[name], size) if name in outputs else 0
        network.parts[name] = Module(part.parameters, part.macs, saved=more + loss, fixed=part.saved - more)
    network.training = estimate_training(network, averaged=config.train.ema is not None)
    return network


def estimate_training(network: Network, averaged: bool) -> int:
    """Bytes of a training step; see the top of this file."""
    copies = 5 if averaged else 4  # weights, gradients, two means, EMA weights; four bytes each
    shared = sum(part.saved for name, part in network.parts.items() if name not in network.heads)
    largest = max(network.parts[name].saved for name in network.heads)
    pixels = network.size[0] * network.size[1]
    image = pixels * 3 * (1 + 4)  # as it comes, and as fractions
    return (
        network.total("parameters") * 4 * copies
        + network.total("fixed")
        + network.micro_batch * (shared + largest + image)
    )


def measure_step(path: Path) -> int:
    """Bytes that PyTorch had allocated at the peak of the second of two real training steps on the GPU."""
    config = read_config(path)
    size, tasks, device = find_size(config), prepare_tasks(config), torch.device("cuda")
    layout = torch.channels_last if config.train.channels_last else torch.contiguous_format
    net = build_network(config.model, tasks, size, load_pretrained=False).to(device, memory_format=layout).train()
    averaged = [parameter.detach().clone() for parameter in net.parameters()] if config.train.ema is not None else []
    batch = make_batch(tasks, size, find_micro_batch(config))
    autocast = partial(torch.autocast, "cuda", dtype=torch.bfloat16, enabled=choose_precision(config) == "bf16")
    update = build_update(config, net, tasks, device, autocast, layout)
    for step in range(2):  # the optimizer's means are there from the second
        torch.cuda.reset_peak_memory_stats()
        update.step(step, [batch], dict.fromkeys(tasks, 1))
    peak = torch.cuda.max_memory_allocated()
    del net, update, averaged, batch
    torch.cuda.empty_cache()
    return peak


# ---------------------------------------------------------------- speed


def time_forwards(paths: list[Path], device: torch.device, repeats: int) -> dict[Path, list[float]]:
    """Seconds of each network's forward pass of one image, in turns; a first turn of each is not counted."""
    nets = {}
    for path in paths:
        config = read_config(path)
        net = build_network(config.model, prepare_tasks(config), find_size(config), load_pretrained=False)
        width, height = find_size(config)
        nets[path] = net.to(device).eval(), torch.rand(1, 3, height, width, device=device)
    times: dict[Path, list[float]] = {path: [] for path in paths}
    with torch.inference_mode():
        for turn in tqdm(range(repeats + 1), desc="turns", leave=False):
            for path, (net, image) in nets.items():
                begin = time.perf_counter()
                net(image)
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if turn:
                    times[path].append(time.perf_counter() - begin)
    return times


def compare_speed(device: torch.device, repeats: int) -> list[str]:
    specialists = sorted(SPECIALISTS.glob("*.yaml"))
    times = time_forwards([SHARED, *specialists], device, repeats)
    one = statistics.median(times[SHARED])
    many = statistics.median(map(sum, zip(*(times[path] for path in specialists), strict=True)))
    lines = ["| network | forward, ms |", "|---|---|"]
    lines += [f"| {name_config(path)} | {1000 * statistics.median(found):.0f} |" for path, found in times.items()]
    return [
        f"One image on {describe_device(device)}, float32, median of {repeats} turns:",
        "",
        *lines,
        "",
        f"{name_config(SHARED)} against the specialists one after the other: "
        + state(f"{many / one:.1f} x faster", f">= {LEAST_SPEEDUP:g} x", many / one >= LEAST_SPEEDUP),
    ]


def describe_device(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads"


# ---------------------------------------------------------------- tables


def name_config(path: Path) -> str:
    """Of a shipped config, its path below configs/ without the ending."""
    return str(path.relative_to(ROOT / "configs").with_suffix("") if path.is_relative_to(ROOT / "configs") else path)


def state(figure: str, bar: str, held: bool) -> str:
    return f"{figure} (bar {bar}: {'held' if held else 'MISSED'})"


def format_tables(networks: list[Network]) -> list[str]:
    with_memory = any(network.measured is not None for network in networks)
    lines = [
        "| config | kind | input | parameters, M | GMAC | precision | saved, MiB an image | micro-batch "
        "| training, GiB |" + (" measured, GiB |" if with_memory else ""),
        "|---|---|---|---|---|---|---|---|---|" + ("---|" if with_memory else ""),
    ]
    for network in networks:
        measured = "" if network.measured is None else f"{network.measured / 2**30:.2f}"
        lines.append(
            f"| {network.config} | {network.kind} | {network.size[0]}x{network.size[1]} "
            f"| {network.total('parameters') / 1e6:.2f} | {network.total('macs') / 1e9:.2f} "
            f"| {network.precision} | {network.total('saved') / 2**20:.1f} | {network.micro_batch} "
            f"| {network.training / 2**30:.2f} |" + (f" {measured} |" if with_memory else "")
        )
    lines += [
        "",
        "By module:",
        "",
        "| config | module | parameters, M | GMAC | saved, MiB an image |",
        "|---|---|---|---|---|",
    ]
    for network in networks:
        for name, part in network.parts.items():
            lines.append(
                f"| {network.config} | {name} | {part.parameters / 1e6:.2f} | {part.macs / 1e9:.2f} "
                f"| {part.saved / 2**20:.1f} |"
            )
    return lines


def compare_sizes(networks: dict[Path, Network]) -> list[str]:
    """The bars, where the networks that they are about were counted; else nothing."""
    specialists = [network for path, network in networks.items() if path.parent == SPECIALISTS]
    if SHARED not in networks or not specialists:
        return []
    shared = networks[SHARED]
    lines = []
    for quantity, unit, scale, most in (
        ("macs", "GMAC", 1e9, MOST_FLOPS),
        ("parameters", "M parameters", 1e6, MOST_PARAMETERS),
    ):
        ours, theirs = shared.total(quantity), sum(network.total(quantity) for network in specialists)
        lines.append(
            f"{ours / scale:.1f} against {theirs / scale:.1f} {unit}: "
            + state(f"{ours / theirs:.1%}", f"<= {most:.0%}", ours <= most * theirs)
        )
    lines.append(
        f"training it at a micro-batch of {shared.micro_batch}: "
        + state(f"{shared.training / 1e9:.1f} GB", f"<= {MOST_BYTES / 1e9:g} GB", shared.training <= MOST_BYTES)
    )
    return ["", f"{shared.config} against {len(specialists)} specialists one after the other:", ""] + [
        f"- {line}" for line in lines
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--config", nargs="+", type=Path, metavar="FILE", help="configs to count (default: all shipped)"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/networks"), help="without ending")
    parser.add_argument("--memory", action="store_true", help="also measure the peak memory of real steps on the GPU")
    parser.add_argument("--speed", action="store_true", help="time the shared network against the specialists instead")
    parser.add_argument("--repeats", type=int, default=5, help="turns of --speed")
    parser.add_argument("--device", default="auto", help="of --speed: auto, cpu, cuda, ...")
    arguments = parser.parse_args()
    try:
        if arguments.speed:
            print("\n".join(compare_speed(pick_device(arguments.device), arguments.repeats)))
            return 0
        if arguments.memory and not torch.cuda.is_available():
            raise WrongUseError("--memory needs a GPU, and there is none")
        paths = [path.resolve() for path in arguments.config or sorted((ROOT / "configs").rglob("*.yaml"))]
        networks = {}
        for path in tqdm(paths, desc="count", leave=False, unit="network"):
            networks[path] = measure(path)
            if arguments.memory:
                networks[path].measured = measure_step(path)
        lines = format_tables(list(networks.values())) + compare_sizes(networks)
        print("\n".join(lines))
        save(arguments.output, lines, list(networks.values()))
    except (ConfigError, WrongUseError) as error:
        print(f"networks: {error}", file=sys.stderr)
        return 2
    except (OSError, ValueError) as error:
        print(f"networks: {error}", file=sys.stderr)
        return 1
    return 0


def save(output: Path, lines: list[str], networks: list[Network]) -> None:
    output.parent.mkdir(parents=True, exist_ok=True)
    table, numbers = output.with_suffix(".md"), output.with_suffix(".json")
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    numbers.write_text(json.dumps([asdict(network) for network in networks], indent=2) + "\n", encoding="utf-8")
    print(f"\nsaved in {table} and {numbers}")


if __name__ == "__main__":
    sys.exit(main())
