"""What a network costs: parameters, operations of an image, and how long it takes on this machine."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

WARM_UP, REPEATS = 2, 10


@dataclass(frozen=True)
class Cost:
    """`parameters`; `flops` of a forward pass of one image, twice the multiply-accumulates; `latency`: the median of
    seconds for one image; `rate`: frames a second in batches of `batch`; `device`: on what."""

    parameters: int
    flops: int
    latency: float
    rate: float
    batch: int
    device: str


@torch.no_grad()
def measure_cost(
    net: nn.Module, tasks: list[str], size: tuple[int, int], device: torch.device, batch: int, autocast
) -> Cost:
    """Measure a network in evaluation mode, on `device`, with all its heads on images of (width, height) `size`.

    From the image on the device to the outputs of the heads: loading, boxes' suppression and resizing are left out.
    """
    parameters = sum(parameter.numel() for parameter in net.parameters())
    rows = dict.fromkeys(tasks)
    one = torch.zeros(1, 3, size[1], size[0], dtype=torch.uint8, device=device)
    with FlopCounterMode(display=False) as counter:
        net(one, rows)
    with autocast():
        latency = _time(net, one, rows, device)
        several = latency if batch == 1 else _time(net, one.expand(batch, -1, -1, -1).contiguous(), rows, device)
    named = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return Cost(parameters, counter.get_total_flops(), latency, batch / several, batch, named)


def _time(net: nn.Module, image: torch.Tensor, rows: dict, device: torch.device) -> float:
    times = []
    for _ in range(WARM_UP + REPEATS):
        begin = time.perf_counter()
        net(image, rows)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[WARM_UP:])
