"""The specialists: their sizes, and the same contract as the shared network's heads."""

import math
from functools import partial

import pytest
import torch

from models.densedepth import STRIDES, DenseDepth
from models.encoders import Encoder
from models.heads import DenseDetectionHead, DetectionOutput
from models.pilotnet import PilotNet, cut_strip
from models.unet import UNet
from models.yolo import Yolo

build_dense_head = partial(DenseDetectionHead, reads=("backbone.8", "backbone.16", "backbone.32"), layers=2)

# As shipped, with the millions of parameters that the comparison counts on.
SHIPPED = {
    "unet": (lambda: UNet("x", outputs=19), 31, 0.5),
    "densedepth": (lambda: DenseDepth("x", Encoder("densenet169", pretrained=False, strides=STRIDES)), 44, 1.5),
    "yolo": (lambda: Yolo("x", partial(build_dense_head, classes=14)), 30, 10),
    "pilotnet": (lambda: PilotNet("x"), 0.25, 0.01),
}


def build_small_encoder():
    return Encoder("resnet18", pretrained=False, norm="group", strides=STRIDES)


SMALL = {
    "unet": lambda: UNet("x", outputs=5, width=8),
    "densedepth": lambda: DenseDepth("x", build_small_encoder()),
    "yolo": lambda: Yolo("x", partial(build_dense_head, classes=3), width=8, depth=1),
    "pilotnet": lambda: PilotNet("x", outputs=2),
}
SIZES = [(64, 96), (75, 131), (33, 257)]


def build_small(kind):
    torch.manual_seed(0)
    net = SMALL[kind]()
    for parameter in net.head_parameters("x"):
        # Heads that start at a constant prediction would make every comparison of outputs true.
        if parameter.abs().sum() == 0:
            torch.nn.init.normal_(parameter, std=0.1)
    return net


def expected_shapes(kind, batch, size):
    cells = sum(math.ceil(size[0] / stride) * math.ceil(size[1] / stride) for stride in (8, 16, 32))
    return {
        "unet": [(batch, 5, *size)],
        "densedepth": [(batch, *size)],
        "yolo": [(batch, cells, 3), (batch, cells, 4), (batch, cells)],
        "pilotnet": [(batch, 2)],
    }[kind]


def flatten(output):
    return list(output[:3]) if isinstance(output, DetectionOutput) else [output]


@pytest.mark.parametrize("kind", SHIPPED)
def test_number_of_parameters(kind):
    build, millions, tolerance = SHIPPED[kind]
    assert sum(parameter.numel() for parameter in build().parameters()) / 1e6 == pytest.approx(millions, abs=tolerance)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", SMALL)
def test_shapes_and_precision_at_every_size(kind, size):
    net = build_small(kind).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = net(torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8), {"x": None})
    assert list(outputs) == ["x"]
    parts = flatten(outputs["x"])
    assert [tuple(part.shape) for part in parts] == expected_shapes(kind, 2, size)
    assert all(part.dtype == torch.float32 for part in parts)


@pytest.mark.parametrize("kind", SMALL)
def test_rows_are_the_same_as_a_batch_of_those_images(kind):
    net = build_small(kind).eval()
    image, rows = torch.rand(3, 3, 64, 96), torch.tensor([2, 0])
    with torch.no_grad():
        selected, alone, other = (
            flatten(out["x"]) for out in (net(image, {"x": rows}), net(image[rows]), net(image[1:]))
        )
    for a, b in zip(selected, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(selected[0], other[0])


@pytest.mark.parametrize("kind", SMALL)
def test_every_parameter_is_shared_or_the_heads_and_gets_a_gradient(kind):
    net = build_small(kind).train()
    features = net.shared_features(torch.rand(1, 3, 64, 96))
    sum(part.sin().sum() for part in flatten(net.run_head("x", features, (64, 96)))).backward()
    parts = net.shared_parameters() + net.head_parameters("x")
    assert sorted(map(id, parts)) == sorted(map(id, net.parameters()))
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []


def test_untrained_depth_is_the_initial_depth():
    net = DenseDepth("x", build_small_encoder(), initial=20.0).eval()
    with torch.no_grad():
        assert net(torch.rand(1, 3, 64, 96))["x"].exp().median() == pytest.approx(20, rel=0.1)


@pytest.mark.parametrize("size", [(640, 1024), (40, 512), (75, 131)])
def test_strip_is_the_lowest_part_in_its_proportions(size):
    """Ramps along both axes stay ramps: the strip ends at the bottom, is centred, and is stretched alike both ways."""
    height, width = size
    y = (torch.arange(height) + 0.5).view(-1, 1).expand(size)
    x = (torch.arange(width) + 0.5).expand(size)
    strip = cut_strip(torch.stack([y, x, x])[None])[0]
    assert strip.shape == (3, 66, 200)
    row_step, column_step = strip[0].diff(dim=0).median(), strip[1].diff(dim=1).median()
    assert row_step == pytest.approx(column_step.item(), rel=0.03)
    assert strip[0, -1].mean() == pytest.approx(height - row_step.item() / 2, abs=0.5)
    assert strip[1].mean() == pytest.approx(width / 2, abs=0.6)
