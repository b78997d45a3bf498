"""A training step: how many kernels it launches, how often the host waits for the GPU, how fast it is.

    python benchmarks/training.py [--repeats 5] [--output runs/benchmarks/training]

Without a GPU: kernels and waits of a step of the default network are counted on tensors without content, in float32 by
the rules for a CPU, because PyTorch runs no backward pass for a GPU that is not there; casts of mixed precision are not
in the count. Steps of the demo's network are timed on the CPU, as ratios in one run. On a GPU also images per second,
the share of the measured bf16 ceiling, and peak memory.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from _fake_gpu import CountKernels, combine_evenly, fake, make_batch
from networks import describe_device, find_micro_batch, find_size, prepare_tasks, state
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from experiment import build_network
from tasks.options import OPTIONS
from train import build_balancer, build_update, choose_autocast
from training.config import Config, load_config
from training.parts import compile_parts, recompute_neck
from training.updates import Update

ROOT = Path(__file__).resolve().parent.parent
DEFAULT, SMALL = ROOT / "configs/asymmetric.yaml", ROOT / "configs/demo.yaml"
STREAMS = 4  # micro-batches of a step under data.labels=as_is
BEFORE = 12575  # kernels of the same step at commit 229cf90, counted on real tensors by the same rules
MOST_WAITS, MOST_KERNELS, LEAST_SHARE, MOST_BYTES = 1, BEFORE // 2, 0.4, 12e9


def build(config: Config, device: torch.device, autocast: Callable, layout: torch.memory_format) -> tuple[Update, dict]:
    """An update of the config's network, untrained, and a micro-batch with blank labels of all tasks."""
    tasks, size = prepare_tasks(config), find_size(config)
    net = build_network(config.model, tasks, size, load_pretrained=False).train()
    net = net.to(device, memory_format=layout)
    if config.train.recompute:
        recompute_neck(net)
    if config.train.compile:
        compile_parts(net)
    return build_update(config, net, tasks, device, autocast, layout), make_batch(tasks, size, find_micro_batch(config))


# ---------------------------------------------------------------- counting


def count_step(path: Path, overrides: Sequence[str] = ()) -> CountKernels:
    """The kernels and waits of the second step of a config, of STREAMS micro-batches whose frames have all labels."""
    config = load_config(path, list(overrides), OPTIONS)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    tasks, size = prepare_tasks(config), find_size(config)
    net = build_network(config.model, tasks, size, load_pretrained=False).train()
    net = net.to(memory_format=torch.channels_last).to("meta")
    batch, balance = make_batch(tasks, size, find_micro_batch(config)), build_balancer(config, tasks)
    with mode:
        net.to_empty(device="cpu")
        if config.train.recompute:
            recompute_neck(net)
        device = torch.device("cpu")
        update = build_update(
            config, net, tasks, device, choose_autocast("fp32", device), torch.channels_last, balance=balance
        )
        if update.balance.gradient_method is not None:
            update._combine = combine_evenly  # the weights are the host's business, and need values
        cycle = [batch | {key: fake(batch[key], mode) for key in ("image", "targets")} for _ in range(STREAMS)]
        with CountKernels():  # the optimizer makes its means in the first
            update.step(0, cycle, dict.fromkeys(tasks, 1))
        with CountKernels() as counter:
            update.step(1, cycle, dict.fromkeys(tasks, 1))
    return counter


COUNTED = {
    "default (`sum`)": [],
    "`balancing.method=dwa`": ["balancing.method=dwa"],
    "`balancing.method=mgda`": ["balancing.method=mgda"],
    "`train.recompute=true`": ["train.recompute=true"],
}


def tabulate_counts() -> tuple[list[str], bool]:
    lines = ["| step of configs/asymmetric.yaml, 4 micro-batches of 4 frames with all labels | kernels | waits |"]
    lines.append("|---|---|---|")
    found = {name: count_step(DEFAULT, options) for name, options in tqdm(COUNTED.items(), "count", leave=False)}
    for name, counter in found.items():
        lines.append(f"| {name} | {sum(counter.kernels.values())} | {sum(counter.waits.values())} |")
    first = next(iter(found.values()))
    kernels, waits = sum(first.kernels.values()), max(sum(each.waits.values()) for each in found.values())
    held = kernels <= MOST_KERNELS and waits <= MOST_WAITS
    share = f"{kernels / BEFORE:.1%} of the {BEFORE} of commit 229cf90"
    lines += [
        "",
        f"- kernels: {state(share, '<= 50%', kernels <= MOST_KERNELS)}",
        f"- waits of the host in a cycle: {state(str(waits), f'<= {MOST_WAITS}', waits <= MOST_WAITS)}",
    ]
    return lines, held


# ---------------------------------------------------------------- times


VARIANTS = {
    "default": [],
    "`train.merge=true`": ["train.merge=true"],
    "`train.recompute=true`": ["train.recompute=true"],
    "`balancing.method=mgda`": ["balancing.method=mgda"],
    "`train.precision=bf16`": ["train.precision=bf16"],
}


def make_cycle(config: Config, batch: dict) -> list[dict]:
    """The micro-batches of a step under data.labels=as_is."""
    if not config.train.merge:
        return [batch] * STREAMS
    rows = {name: torch.arange(STREAMS * len(found)) for name, found in batch["rows"].items()}
    repeat = partial(torch.utils._pytree.tree_map, lambda leaf: torch.cat([leaf] * STREAMS))
    merged = {key: repeat(batch[key]) for key in ("image", "targets", "counts")}
    return [batch | merged | {"rows": rows, "frame": batch["frame"] * STREAMS}]


def time_steps(
    path: Path, variants: dict[str, list[str]], device: torch.device, repeats: int
) -> dict[str, list[float]]:
    """Seconds of a step of each variant, in turns; the first turn of each is not counted."""
    layout = torch.channels_last
    built = {}
    for name, options in variants.items():
        config = load_config(path, options, OPTIONS)
        update, batch = build(config, device, choose_autocast(config.train.precision, device), layout)
        built[name] = update, make_cycle(config, batch), dict.fromkeys(config.tasks, 1)
    times: dict[str, list[float]] = {name: [] for name in variants}
    for turn in tqdm(range(repeats + 1), desc="turns", leave=False):
        for name, (update, cycle, counts) in built.items():
            begin = time.perf_counter()
            update.step(turn, cycle, counts)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                times[name].append(time.perf_counter() - begin)
    return times


def tabulate_times(device: torch.device, repeats: int) -> list[str]:
    times = {name: statistics.median(found) for name, found in time_steps(SMALL, VARIANTS, device, repeats).items()}
    lines = ["| step of configs/demo.yaml, 4 micro-batches of 2 frames | ms | against the default |", "|---|---|---|"]
    for name, found in times.items():
        lines.append(f"| {name} | {1000 * found:.0f} | {found / times['default']:.2f} x |")
    return [f"On {describe_device(device)}, median of {repeats} turns:", "", *lines]


# ---------------------------------------------------------------- a GPU


def measure_ceiling() -> float:
    """FLOP/s of a large bf16 matrix product on this GPU: what a network could reach at most."""
    matrix = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        matrix @ matrix
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(10):
        matrix @ matrix
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (begin.elapsed_time(end) / 1000)


GPU_VARIANTS = {
    "default": [],
    "one label a frame": [],
    "`train.compile=true`": ["train.compile=true"],
    "`train.recompute=true`": ["train.recompute=true"],
    "`balancing.method=mgda`": ["balancing.method=mgda"],
    "`train.precision=fp32`": ["train.precision=fp32"],
}


def tabulate_gpu(repeats: int) -> tuple[list[str], bool]:
    device = torch.device("cuda")
    ceiling = measure_ceiling()
    lines = [
        f"On {torch.cuda.get_device_name()}, configs/asymmetric.yaml, 4 micro-batches of 4 frames; the ceiling, a bf16 "
        f"matrix product, is {ceiling / 1e12:.0f} TFLOP/s:", "",
        "| variant | images/s | share of the ceiling | peak memory, GB |", "|---|---|---|---|",
    ]  # fmt: skip
    held = True
    for name, options in GPU_VARIANTS.items():
        config = load_config(DEFAULT, options, OPTIONS)
        update, batch = build(config, device, choose_autocast(config.train.precision, device), torch.channels_last)
        cycle = [batch] * STREAMS
        if name == "one label a frame":
            cycle = [
                batch | {key: {task: batch[key][task]} for key in ("targets", "rows", "counts")}
                for task in config.tasks
            ]
        counts = dict.fromkeys(config.tasks, 1)
        for step in range(3):
            update.step(step, cycle, counts)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        with FlopCounterMode(display=False) as counter:
            update.step(3, cycle, counts)
        begin = time.perf_counter()
        for step in range(repeats):
            update.step(4 + step, cycle, counts)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - begin) / repeats
        images = STREAMS * find_micro_batch(config)
        share, peak = counter.get_total_flops() / seconds / ceiling, torch.cuda.max_memory_allocated()
        lines.append(f"| {name} | {images / seconds:.1f} | {share:.0%} | {peak / 1e9:.1f} |")
        if name == "default":
            held = peak <= MOST_BYTES
            verdicts = [
                "",
                f"- share of the ceiling: {state(f'{share:.0%}', f'aim >= {LEAST_SHARE:.0%}', share >= LEAST_SHARE)}",
                f"- peak memory: {state(f'{peak / 1e9:.1f} GB', f'<= {MOST_BYTES / 1e9:g} GB', held)}",
            ]
        del update, batch, cycle
        torch.cuda.empty_cache()
    return lines + verdicts, held


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="turns that are timed")
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/training"), help="without ending")
    parser.add_argument("--append", type=Path, metavar="FILE", help="also add the table of the GPU to this page")
    arguments = parser.parse_args()
    lines, held = tabulate_counts()
    lines += ["", *tabulate_times(torch.device("cpu"), arguments.repeats)]
    if torch.cuda.is_available():
        table, good = tabulate_gpu(max(arguments.repeats, 10))
        lines, held = [*lines, "", *table], held and good
        if arguments.append:
            with arguments.append.open("a", encoding="utf-8") as page:
                page.write("\n".join(["", "### Training on a GPU", "", *table, ""]))
    print("\n".join(lines))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
