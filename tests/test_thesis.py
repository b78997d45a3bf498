"""The thesis, reproduced: its network, its box grid, and groups of weights that step at their own pace."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from derived_root import write_root
from small_net import NAMES, build_backward, build_update, count_cycle, make_batch, take_step
from small_net import build_net as build_small_net
from tiny_run import are_same_weights, read_log, run_train, stop_at_check
from torch import nn
from torch.utils.data import default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import box_iou

from a2d2.dataset import Geometry
from models.encoders import Encoder
from models.thesis import BoxGridHead, BoxGridOutput, Fusion, ThesisNeck, ThesisNet, log_softplus
from tasks import TASKS
from tasks.detection import IGNORED, PADDING, Detection, choose_slots
from training.balancing import Normaliser
from training.checkpoint import load_newest_checkpoint, save_checkpoint
from training.config import load_config
from training.updates import SHARED, AsyncUpdate, CycleUpdate

CONFIGS = Path(__file__).resolve().parent.parent / "configs/thesis"
OPTIONS = {name: task.Options for name, task in TASKS.items()}
HEADS = {
    "s": ("map", {"outputs": 38}),
    "d": ("log_depth", {"initial": 20.0}),
    "b": ("box_grid", {"classes": 14, "slots": 10}),
    "n": ("numbers", {"outputs": 10}),
}


def build_net(size, name="resnet18", norm="group"):
    torch.manual_seed(0)
    return ThesisNet(Encoder(name, pretrained=False, norm=norm), HEADS, size)


# The network


@pytest.mark.parametrize("size", [(64, 96), (75, 131), (33, 257)])
def test_shapes_and_precision_at_every_size(size):
    net = build_net(size).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        outputs = net(torch.randint(0, 256, (2, 3, *size), dtype=torch.uint8))
    rows, columns = math.ceil(size[0] / 128), math.ceil(size[1] / 128)
    parts = {name: output.values if name == "b" else output for name, output in outputs.items()}
    shapes = {"s": (2, 38, *size), "d": (2, *size), "b": (2, rows, columns, 10, 19), "n": (2, 10)}
    assert {name: tuple(part.shape) for name, part in parts.items()} == shapes
    assert outputs["b"].size == size
    assert {part.dtype for part in parts.values()} == {torch.float32}
    assert 15 < outputs["d"].exp().median() < 25


def test_it_has_the_parameters_and_operations_of_the_thesis():
    net = build_net((1024, 1024), "resnet50", "frozen").eval()
    assert sum(parameter.numel() for parameter in net.parameters()) / 1e6 == pytest.approx(61.7, abs=0.1)
    # all its layers grow with the area, so a sixteenth of it is enough; 5 of the thesis's 43 channels cost 3.0 of 506
    net = build_net((256, 256), "resnet50", "frozen").eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(torch.rand(1, 3, 256, 256))
    assert 16 * counter.get_total_flops() / 2e9 == pytest.approx(506 - 3.0, abs=1)


def test_every_parameter_belongs_to_one_part_and_gets_a_gradient():
    net = build_net((75, 131)).train()
    outputs = net(torch.rand(1, 3, 75, 131))
    sum((output.values if name == "b" else output).sin().sum() for name, output in outputs.items()).backward()
    parts = [net.shared_parameters(), *(net.head_parameters(name) for name in net.heads)]
    assert sorted(map(id, (p for part in parts for p in part))) == sorted(map(id, net.parameters()))
    assert [name for name, parameter in net.named_parameters() if parameter.grad is None] == []


def test_fusion_weights_start_equal_and_never_count_below_nothing():
    fuse, (a, b) = Fusion(2), torch.randn(2, 1, 256, 4, 4)

    def follow(features):
        return nn.functional.leaky_relu(fuse.convolution(features))

    with torch.no_grad():
        torch.testing.assert_close(fuse(a, b), follow((a + b) / 2), rtol=1e-3, atol=1e-3)
        fuse.weights.copy_(torch.tensor([-2.0, 0.5]))
        torch.testing.assert_close(fuse(a, b), follow(b), rtol=1e-3, atol=1e-3)


def test_the_neck_starts_alive_and_every_level_sees_every_level():
    torch.manual_seed(0)
    channels = {f"encoder.{stride}": 32 for stride in (4, 8, 16, 32)}
    neck = ThesisNeck(channels)
    for output in neck.channels:
        inputs = {name: torch.randn(2, 32, 128 // int(name[8:]), 160 // int(name[8:])) for name in channels}
        for features in inputs.values():
            features.requires_grad_()
        prediction = neck(inputs)[output]
        # what differs between places and images is no whisper beside the mean
        assert prediction.std(dim=(0, 2, 3)).mean() > 0.1 * prediction.abs().mean() > 0.01
        prediction.square().sum().backward()
        assert all(features.grad.abs().sum() > 0 for features in inputs.values()), output


def test_log_depth_is_that_of_a_relu_but_never_without_gradient():
    metres = torch.tensor([-1e4, -50.0, -1.0, 0.0, 0.5, 10.0, 123.0, 500.0], dtype=torch.float64, requires_grad=True)
    prediction = log_softplus(metres[None, None])[0, 0]
    exact = [-1e4, -50.0, *(math.log(math.log1p(math.exp(x))) for x in (-1.0, 0.0, 0.5, 10.0, 123.0, 500.0))]
    assert prediction.tolist() == pytest.approx(exact, rel=1e-7)
    assert prediction[-3:].exp().tolist() == pytest.approx([10, 123, 500], rel=1e-5)
    prediction.sum().backward()
    assert metres.grad.isfinite().all() and (metres.grad > 0).all()
    assert metres.grad[:2].tolist() == pytest.approx([1, 1])


def test_a_cell_of_the_grid_sees_its_own_part_of_the_image():
    """Row 2, column 0 of 3 x 5, not the mirrored place: the grid is rows of y, columns of x."""
    torch.manual_seed(0)
    head = BoxGridHead(8, None, classes=2, slots=3)
    features = torch.zeros(1, 8, 24, 40)
    with torch.no_grad():
        head.last.weight[..., [0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 2, 0, 2, 0, 1, 2]] = 0  # no look at neighbours
        dark = head({"neck.16": features}, (384, 640)).values
        features[..., 20, 0] = 1
        lit = head({"neck.16": features}, (384, 640)).values
    changed = (lit != dark).flatten(3).any(dim=3)
    assert changed.nonzero().tolist() == [[0, 2, 0]]


def test_foreign_languages_are_named():
    with pytest.raises(ValueError, match="no head for boxes, only map, log_depth, box_grid, numbers"):
        ThesisNet(Encoder("resnet18", pretrained=False), {"x": ("boxes", {"classes": 3})}, (64, 64))


# The box grid


def make_task(**options):
    return Detection(Detection.Options(box_coder="grid", classes="all", **{"min_size": 0.0} | options))


def make_target(boxes, classes, size):
    """Rows from large to small, as `transform` makes them."""
    target = Detection(Detection.Options(classes="all")).blank(size[::-1])
    order = sorted(
        range(len(boxes)), key=lambda row: -(boxes[row][2] - boxes[row][0]) * (boxes[row][3] - boxes[row][1])
    )
    for place, row in enumerate(order):
        target["boxes"][place] = torch.tensor(boxes[row])
        target["classes"][place] = classes[row]
        target["known"][place] = max(classes[row], -1)
    return default_collate([target])


def draw_boxes(rng, count, size):
    edges = rng.uniform(0, 1, (count, 2, 2)) * (size[1], size[0])
    boxes = np.concatenate([edges.min(axis=1), edges.max(axis=1)], axis=1)
    return boxes[(boxes[:, 2:] - boxes[:, :2] > 2).all(axis=1)].tolist()


def logit(share):
    return math.log(share / (1 - share))


def encode(boxes, classes, size, sure=30.0):
    """A grid that says these boxes, one slot after the other in each cell, and is sure of its silence elsewhere."""
    height, width = size
    values = torch.full((1, math.ceil(height / 128), math.ceil(width / 128), 10, 19), -sure, dtype=torch.float64)
    used = {}
    for (x1, y1, x2, y2), label in zip(boxes, classes, strict=True):
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        row, column = int(y // 128), int(x // 128)
        slot = used[row, column] = used.get((row, column), -1) + 1
        shares = [x / 128 - column, y / 128 - row, (x2 - x1) / width, (y2 - y1) / height]
        values[0, row, column, slot, :5] = torch.tensor([sure, *map(logit, shares)])
        values[0, row, column, slot, 5 + label] = sure
    return BoxGridOutput(values, size)


@pytest.mark.parametrize("size", [(300, 500), (75, 131), (640, 1024)])
def test_boxes_come_back_out_of_the_grid_and_cost_nothing_there(size):
    rng = np.random.default_rng(0)
    boxes = draw_boxes(rng, 12, size)
    boxes = boxes[:10]  # as many as a cell holds, in case there is but one
    classes = rng.integers(0, 14, len(boxes)).tolist()
    task, output = make_task(nms_threshold=1.0), encode(boxes, classes, size)
    target = make_target(boxes, classes, size)
    assert task.count(target) == len(boxes)
    assert task.loss(output, target).item() < 1e-6
    for scale in (1, 2):
        (prediction,) = task.predict(output, (scale * size[1], scale * size[0]))
        assert len(prediction["boxes"]) == len(boxes) and prediction["scores"].min() > 0.999
        found = sorted(
            zip(prediction["labels"].tolist(), (prediction["boxes"] / scale).round(decimals=3).tolist(), strict=True)
        )
        true = sorted(zip(classes, torch.tensor(boxes).round(decimals=3).tolist(), strict=True))
        for ours, theirs in zip(found, true, strict=True):
            assert ours[0] == theirs[0] and ours[1] == pytest.approx(theirs[1], abs=0.01)


def test_predictions_are_cut_to_the_image_and_overlapping_ones_suppressed():
    box = [100.0, 60.0, 180.0, 120.0]
    twice = encode([box, [101.0, 60.0, 180.0, 121.0]], [3, 3], (256, 256))
    assert [
        len(make_task(nms_threshold=threshold).predict(twice, (256, 256))[0]["boxes"]) for threshold in (0.6, 1)
    ] == [
        1,
        2,
    ]
    output = encode([box], [3], (256, 256))
    output.values[0, 0, 1, 0, 3:5] = 20.0  # as large as the image, about a middle at (140, 90)
    (prediction,) = make_task().predict(output, (256, 256))
    assert prediction["boxes"][0].tolist() == pytest.approx([12, 0, 256, 218], abs=1e-3)


def test_the_row_of_a_box_is_its_y_and_the_column_its_x():
    size, box = (512, 512), [400.0, 20.0, 480.0, 100.0]
    output, target = encode([box], [5], size), make_target([box], [5], size)
    mirrored = output._replace(values=output.values.transpose(1, 2))
    task = make_task()
    assert task.loss(output, target).item() < 1e-6 < 1 < task.loss(mirrored, target).item()
    assert output.values[0, 0, 3, 0, 0] == 30


def test_loss_by_hand():
    """One cell that says nothing: every share is a half, so all ten slots hold the box [32, 32, 96, 96]."""
    output = BoxGridOutput(torch.zeros(1, 1, 1, 10, 19), (128, 128))
    target = make_target([[32.0, 16.0, 96.0, 112.0]], [4], (128, 128))
    iou = (64 * 64) / (64 * 96)
    coordinates = 5 * (math.sqrt(0.5) - math.sqrt(0.75)) ** 2  # of the height alone: middle and width are right
    expected = coordinates + (0.5 - iou) ** 2 + 14 * 0.25 + 0.5 * 9 * 0.25
    assert make_task().loss(output, target).item() == pytest.approx(expected, rel=1e-5)


def cost_by_loops(values, boxes, classes, size):
    """The loss of one image, number by number."""

    def squash(value):
        return 1 / (1 + math.exp(-value))

    height, width = size
    rows, columns, slots, _ = values.shape
    numbers = values.tolist()
    taken, total = {}, 0.0
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in boxes]
    order = sorted(range(len(boxes)), key=lambda box: (classes[box] < 0, -area[box]))
    for index in order:
        x1, y1, x2, y2 = boxes[index]
        x, y = (x1 + x2) / 2, (y1 + y2) / 2
        row, column = int(y / 128), int(x / 128)
        best, chosen = -1.0, None
        for slot in range(slots):
            if (row, column, slot) in taken:
                continue
            predicted = [squash(number) for number in numbers[row][column][slot]]
            mx, my, w, h = (
                (column + predicted[1]) * 128,
                (row + predicted[2]) * 128,
                predicted[3] * width,
                predicted[4] * height,
            )
            across = min(x2, mx + w / 2) - max(x1, mx - w / 2)
            down = min(y2, my + h / 2) - max(y1, my - h / 2)
            common = max(across, 0) * max(down, 0)
            overlap = common / (area[index] + w * h - common)
            if overlap > best:
                best, chosen = overlap, slot
        if chosen is None:
            continue
        taken[row, column, chosen] = index
        if classes[index] < 0:
            continue
        predicted = [squash(number) for number in numbers[row][column][chosen]]
        total += 5 * ((predicted[1] - (x / 128 - column)) ** 2 + (predicted[2] - (y / 128 - row)) ** 2)
        total += 5 * (math.sqrt(predicted[3]) - math.sqrt((x2 - x1) / width)) ** 2
        total += 5 * (math.sqrt(predicted[4]) - math.sqrt((y2 - y1) / height)) ** 2
        total += (predicted[0] - best) ** 2
        total += sum((predicted[5 + label] - (label == classes[index])) ** 2 for label in range(14))
    for row in range(rows):
        for column in range(columns):
            for slot in range(slots):
                if (row, column, slot) not in taken:
                    total += 0.5 * squash(numbers[row][column][slot][0]) ** 2
    return total


@pytest.mark.parametrize(("size", "count"), [((300, 420), 20), ((75, 131), 16), ((128, 128), 14)])
def test_loss_is_the_one_by_loops(size, count):
    """Random predictions and boxes, some ignored, in the smaller images more of them than slots."""
    rng = np.random.default_rng(count)
    torch.manual_seed(count)
    boxes = draw_boxes(rng, count, size)
    classes = [IGNORED if rng.random() < 0.2 else int(rng.integers(0, 14)) for _ in boxes]
    shape = (1, math.ceil(size[0] / 128), math.ceil(size[1] / 128), 10, 19)
    output = BoxGridOutput(torch.randn(shape, dtype=torch.float64), size)
    task, target = make_task(), make_target(boxes, classes, size)
    expected = cost_by_loops(output.values[0], boxes, classes, size)
    assert task.loss(output, target).item() == pytest.approx(expected, rel=1e-4)
    # images of a batch add up
    both = BoxGridOutput(output.values.repeat(2, 1, 1, 1, 1), size)
    assert task.loss(both, default_collate([{k: v[0] for k, v in target.items()}] * 2)).item() == pytest.approx(
        2 * expected, rel=1e-4
    )


def test_a_box_takes_the_free_slot_it_overlaps_most():
    overlaps = torch.tensor([[0.1, 0.6, 0.3], [0.2, 0.7, 0.5], [0.9, 0.1, 0.2], [0.4, 0.4, 0.4], [0.0, 0.0, 0.8]])
    assert choose_slots(torch.tensor([4, 4, 7, 4, 4]), overlaps).tolist() == [1, 2, 0, 0, -1]


def test_the_class_of_every_box_counts():
    size, boxes = (256, 256), [[10.0, 10, 60, 60], [20.0, 30, 100, 90], [40.0, 50, 90, 120], [140.0, 150, 220, 200]]
    output = encode(boxes, [0, 1, 2, 3], size)
    task = make_task()
    for row in range(len(boxes)):
        classes = [0, 1, 2, 3]
        classes[row] = 9
        # one class that is missed and one that is wrong
        assert task.loss(output, make_target(boxes, classes, size)).item() == pytest.approx(2, rel=1e-5)


def test_an_empty_frame_teaches_that_there_is_nothing():
    task, size = make_task(), (200, 300)
    target = make_target([], [], size)
    values = torch.randn(1, 2, 3, 10, 19, requires_grad=True)
    loss = task.loss(BoxGridOutput(values, size), target)
    assert task.count(target) == 0
    assert loss.item() == pytest.approx(0.5 * values[..., 0].sigmoid().square().sum().item(), rel=1e-5)
    loss.backward()
    assert (values.grad[..., 0] > 0).all() and (values.grad[..., 1:] == 0).all()


def test_ignored_boxes_are_neither_positive_nor_background():
    task, size, box = make_task(), (256, 256), [20.0, 30.0, 100.0, 90.0]
    target = make_target([box], [IGNORED], size)
    found = encode([box], [5], size)
    silent = found._replace(values=found.values.clone())
    silent.values[..., 0] = -30
    assert task.count(target) == 0
    assert task.loss(found, target).item() == pytest.approx(task.loss(silent, target).item(), abs=1e-9)
    # predicted twice, or where there is no box, it is wrong
    assert task.loss(encode([box, box], [5, 5], size), target).item() == pytest.approx(0.5, rel=1e-5)
    assert task.loss(found, make_target([], [], size)).item() == pytest.approx(0.5, rel=1e-5)
    # a real box is served first
    both = make_target([box, [25.0, 30.0, 95.0, 90.0]], [IGNORED, 5], size)
    assert task.loss(encode([[25.0, 30.0, 95.0, 90.0]], [5], size), both).item() < 1e-6


def test_of_more_boxes_than_slots_the_largest_are_learned():
    size = (128, 128)
    boxes = [[64.0 - side, 64.0 - side, 64.0 + side, 64.0 + side] for side in range(5, 65, 5)]
    task, target = make_task(), make_target(boxes, [1] * 12, (128, 128))
    assert task.count(target) == 10
    assert task.loss(encode(boxes[2:], [1] * 10, size), target).item() < 1e-6


def test_targets_are_made_as_for_the_dense_box_coder():
    label = [
        {"box": [10, 8, 60, 40], "class": "Car", "visible": 1.0},
        {"box": [3, 3, 8, 8], "class": "Ufo", "visible": 1},
    ]
    grid, dense = (
        Detection(Detection.Options(box_coder=coder)).transform(label, Geometry.identity((128, 64)))
        for coder in ("grid", "dense")
    )
    assert all(torch.equal(grid[key], dense[key]) for key in dense)
    # a sliver whose middle is, by rounding, on the image's edge
    edge = np.nextafter(np.float32(640), np.float32(0)).item()
    target = make_target([[0.0, edge, 10.0, 640.0]], [IGNORED], (640, 1024))
    assert make_task().loss(BoxGridOutput(torch.zeros(1, 5, 8, 10, 19), (640, 1024)), target).isfinite()


@pytest.mark.parametrize("predicted", [-200.0, -20.0, 0.0, 200.0])
def test_gradients_are_finite_whatever_is_predicted(predicted):
    size, box = (128, 128), [20.0, 30.0, 100.0, 90.0]
    values = torch.full((1, 1, 1, 10, 19), predicted, requires_grad=True)
    make_task().loss(BoxGridOutput(values, size), make_target([box], [5], size)).backward()
    assert values.grad.isfinite().all()
    if abs(predicted) <= 20:  # the gradient enlarges a box that is far too small
        assert (values.grad[0, 0, 0, :, 3:5].amin(dim=0) < 0).all() or predicted == 0


def test_padding_counts_nothing():
    target = make_target([[20.0, 30.0, 100.0, 90.0]], [5], (128, 128))
    assert (target["classes"] == PADDING).sum() == 63
    assert make_task().count(default_collate([make_task().blank((128, 128))])) == 0


def test_the_shared_network_can_have_the_grid_too():
    task = make_task()
    assert (task.output_format, task.head_arguments()) == ("box_grid", {"classes": 14, "slots": 10})
    head = task.head({"neck.8": 16, "neck.16": 32})
    output = head({"neck.16": torch.randn(2, 32, 5, 9)}, (75, 131))
    target = make_target([[20.0, 30.0, 70.0, 60.0]], [5], (75, 131))
    loss = task.loss(BoxGridOutput(output.values[:1], output.size), target)
    before = loss.item()
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-3)
    loss.backward()
    optimizer.step()
    output = head({"neck.16": torch.randn(2, 32, 5, 9)}, (75, 131))
    assert task.loss(BoxGridOutput(output.values[:1], output.size), target).item() < before


# Groups that step at their own pace


class Options:
    """The train block, as far as AsyncUpdate reads it."""

    class Group:
        def __init__(self, lr, samples):
            self.lr, self.samples = lr, samples

    def __init__(self, **groups):
        self.groups = {name: self.Group(*values) for name, values in groups.items()}


SLOW = Options(encoder=(1e-2, 6), a=(3e-2, 2), b=(1e-2, 3), c=(1e-2, 4))


def make_cycle(number, labels=("a", "b"), rows=1):
    """A micro-batch for each of the labels, as `one_at_a_time` draws them."""
    torch.manual_seed(1000 + number)
    cycle = []
    for label in labels:
        target = {"value": torch.rand(rows).double(), "weight": torch.arange(1, rows + 1)}
        image = torch.rand(rows, 3, 2, 2).double()
        cycle.append(make_batch(image, target, {label: [True] * rows}, [f"frame {number} {label}"] * rows))
    return cycle


def copy_parts(net):
    parts = {SHARED: net.shared_parameters()} | {name: net.head_parameters(name) for name in net.heads}
    return {name: [parameter.detach().clone() for parameter in parameters] for name, parameters in parts.items()}


def find_changed(before, after):
    return {name for name in before if not all(map(torch.equal, before[name], after[name]))}


def test_groups_step_exactly_on_their_counts_and_absent_ones_never():
    net = build_small_net()
    update = build_update(AsyncUpdate, SLOW, net)
    moved = []
    for number in range(6):
        before = copy_parts(net)
        losses, measures = take_step(update, number, make_cycle(number))
        moved.append(find_changed(before, copy_parts(net)))
        assert set(losses) == {"a", "b"}
    assert moved == [set(), {"a"}, {SHARED, "b"}, {"a"}, set(), {SHARED, "a", "b"}]
    assert measures == {"steps/encoder": 2, "steps/a": 3, "steps/b": 2, "steps/c": 0}
    assert update.state_dict()["optimizers"]["c"]["state"] == {}
    assert all(parameter.grad is None for parameter in net.parameters())
    # c comes at last, and steps on its own four samples
    for number in range(6, 10):
        before = copy_parts(net)
        take_step(update, number, make_cycle(number, ["c"]))
    assert find_changed(before, copy_parts(net)) == {"c"}


def test_the_updates_are_those_of_adam_on_plainly_added_losses():
    """Several frames are as many cycles of one sample; a loss counts by its weight over the samples of a step."""
    net, weights = build_small_net(), {"a": 2.0, "b": 0.25, "c": 1.0}
    plain = copy.deepcopy(net)
    update = build_update(AsyncUpdate, SLOW, net, weights)
    adams = {
        name: torch.optim.Adam(parameters, lr=SLOW.groups[name].lr)
        for name, parameters in [(SHARED, plain.shared_parameters())]
        + [(name, plain.head_parameters(name)) for name in NAMES]
    }
    seen = dict.fromkeys(adams, 0)
    for number in range(12):
        labels = ("a", "b", "c")[: 1 + number % 3]
        rows = 1 + number % 2
        cycle = make_cycle(number, labels, rows)
        take_step(update, number, cycle)
        for batch, label in zip(cycle, labels, strict=True):
            output, target = plain(batch["image"], {label: None})[label], batch["targets"][label]
            total = (output - target["value"]).square().sum()  # a sample's own weight and its count cancel
            (total * weights[label] / SLOW.groups[label].samples).backward()
            for name in (SHARED, label):
                seen[name] += rows
        for name, adam in adams.items():
            if seen[name] >= SLOW.groups[name].samples:
                adam.step()
                adam.zero_grad()
                seen[name] = 0
    for ours, theirs in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    assert find_changed(copy_parts(build_small_net()), copy_parts(net)) == {SHARED, *NAMES}


def test_a_head_that_stops_the_gradient_adds_no_sample_to_the_shared_part():
    net = build_small_net()
    net.heads["b"].stop_gradient = True
    update = build_update(AsyncUpdate, SLOW, net)
    for number in range(6):
        take_step(update, number, make_cycle(number))
    assert update.steps == {SHARED: 1, "a": 3, "b": 2, "c": 0}


def test_a_saved_state_goes_on_to_the_bit(tmp_path):
    def run(update, numbers):
        for number in numbers:
            take_step(update, number, make_cycle(number))

    whole = build_small_net()
    run(build_update(AsyncUpdate, SLOW, whole), range(11))

    first = build_small_net()
    update = build_update(AsyncUpdate, SLOW, first)
    run(update, range(5))
    state = {"net": first.state_dict(), "update": update.state_dict()}
    assert any(gradient is not None for gradient in state["update"]["gradients"][SHARED])  # some wait for their step
    save_checkpoint(tmp_path, 5, state, 1)
    _, state = load_newest_checkpoint(tmp_path)
    second = build_small_net()
    second.load_state_dict(state["net"])
    update = build_update(AsyncUpdate, SLOW, second)
    update.load_state_dict(state["update"])
    run(update, range(5, 11))
    assert all(map(torch.equal, second.parameters(), whole.parameters()))
    assert not all(map(torch.equal, second.parameters(), first.parameters()))


def test_what_is_not_finite_is_named_before_any_weight_is_changed():
    net = build_small_net()
    update = build_update(AsyncUpdate, Options(encoder=(1e-2, 1), a=(1e-2, 1), b=(1e-2, 1), c=(1e-2, 1)), net)
    before = copy_parts(net)
    net.heads["b"].layer.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(RuntimeError, match=r"gradient is not finite; frames of this step: frame 0 a, frame 0 b"):
        take_step(update, 0, make_cycle(0))
    assert find_changed(before, copy_parts(net)) == set()


# The recipes


def load_recipe(name):
    return load_config(CONFIGS / f"{name}.yaml", [], OPTIONS)


def test_the_asymmetric_recipe_weighs_the_tasks_as_the_thesis_did():
    config = load_recipe("asymmetric")
    net = build_small_net(TASKS)
    update = build_update(AsyncUpdate, config.train, net, config.balancing.weights)
    shares = {}
    for name in TASKS:
        (batch,) = make_cycle(0, [name])
        take_step(update, 0, [batch])
        ours = torch.cat([parameter.grad.flatten() for parameter in net.shared_parameters()])
        net.zero_grad()
        (net(batch["image"], {name: None})[name] - batch["targets"][name]["value"]).square().sum().backward()
        theirs = torch.cat([parameter.grad.flatten() for parameter in net.shared_parameters()])
        net.zero_grad()
        shares[name] = theirs.norm() / ours.norm()
        torch.testing.assert_close(ours * shares[name], theirs, rtol=1e-9, atol=1e-12)
    expected = {"segmentation": 2560, "depth": 3200, "detection": 6400, "steering": 24}
    assert shares == pytest.approx(expected, rel=1e-9)
    assert {name: group.samples for name, group in config.train.groups.items()} == {
        "encoder": 48, "segmentation": 32, "depth": 16, "detection": 16, "steering": 24,
    }  # fmt: skip


def test_the_other_recipes_are_adam_at_a_constant_rate():
    config = load_recipe("symmetric")
    net = build_small_net()
    plain = copy.deepcopy(net)
    update = build_update(CycleUpdate, config.train, net)
    adam = torch.optim.Adam(plain.parameters(), lr=1e-5, fused=True)
    backward = build_backward(plain)
    for number in range(5):
        cycle = make_cycle(number)
        take_step(update, number * config.train.steps // 5, cycle)
        adam.zero_grad()
        backward.run(
            cycle, Normaliser(backward.tasks).find_divisors(count_cycle(NAMES, cycle)), dict.fromkeys(NAMES, 1.0)
        )
        adam.step()
    assert all(map(torch.equal, net.parameters(), plain.parameters()))
    assert find_changed(copy_parts(build_small_net()), copy_parts(net)) == {SHARED, "a", "b"}


@pytest.mark.parametrize("name", ["symmetric", "asymmetric", *TASKS])
def test_recipes_have_the_thesis_network_sizes_and_epochs(name):
    config = load_recipe(name)
    assert (config.model.kind, config.model.input_size, config.data.split) == ("thesis", (1024, 1024), "thesis")
    assert set(config.tasks) == ({name} if name in TASKS else set(TASKS))
    tasks = {task: TASKS[task](options) for task, options in config.tasks.items()}
    arguments = {task: (made.output_format, made.head_arguments()) for task, made in tasks.items()}
    expected = {
        "segmentation": ("map", {"outputs": 38}),
        "depth": ("log_depth", {"initial": 10.0}),
        "detection": ("box_grid", {"classes": 14, "slots": 10}),
        "steering": ("numbers", {"outputs": 10}),
    }
    assert arguments == {task: expected[task] for task in config.tasks}
    # 40 epochs in batches of four frames, or 10 over four copies, one frame of each in a cycle
    epochs = config.train.steps * config.train.micro_batch / 9899
    assert epochs == (10 if name == "asymmetric" else 40)


SMALL = (
    "data.split=by_scene",
    "data.workers=0",
    "model.input_size=[64, 48]",
    "model.encoder={name: resnet18, pretrained: false, norm: group}",
    "train.steps=4",
    "train.evaluate_every=2",
    "train.save_every=3",
    "train.log_every=1",
    "log.tensorboard=false",
)
QUICK = (
    "train.groups.encoder.samples=8",
    "train.groups.segmentation.samples=3",
    "train.groups.depth.samples=2",
    "train.groups.detection.samples=3",
    "train.groups.steering.samples=4",
)


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    folder = tmp_path_factory.mktemp("set") / "root"
    write_root(folder)
    return f"data.roots=[{folder}]"


@pytest.fixture
def two_threads():
    """As few as can share a matrix product in different ways, which changes its last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_an_asynchronous_run_that_is_stopped_goes_on_as_if_it_had_not_been(roots, tmp_path):
    """Stopped before the second cycle and before the fourth, when gradients of all groups wait for their step."""
    recipe = CONFIGS / "asymmetric.yaml"
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, recipe, tmp_path / "whole", roots, *SMALL, *QUICK) == 0
    for number in (2, 4):
        with pytest.MonkeyPatch.context() as patch:
            stop_at_check(patch, number)
            assert run_train(patch, recipe, tmp_path / "run", roots, *SMALL, *QUICK, "--resume") == 75
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, recipe, tmp_path / "run", roots, *SMALL, *QUICK, "--resume") == 0
    assert are_same_weights(tmp_path / "run", tmp_path / "whole")
    log = read_log(tmp_path / "run")
    assert log == read_log(tmp_path / "whole")
    last = [line for line in log if line["kind"] == "train"][-1]
    assert [last[f"steps/{name}"] for name in ("encoder", *TASKS)] == [2, 1, 2, 1, 1]
    assert all(math.isfinite(last[f"loss/{name}"]) for name in TASKS)


@pytest.mark.parametrize("name", ["symmetric", "steering"])
def test_the_other_recipes_train(roots, tmp_path, name):
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, CONFIGS / f"{name}.yaml", tmp_path / "run", roots, *SMALL, "train.steps=2") == 0
    losses = [line for line in read_log(tmp_path / "run") if line["kind"] == "train"]
    assert len(losses) == 2 and all(line["lr_factor"] == 1 for line in losses)


def test_best_iou_is_the_thesis_number():
    task = make_task()
    target = make_target([[0.0, 0.0, 40.0, 40.0], [60.0, 0.0, 80.0, 20.0]], [1, 2], (128, 128))
    boxes = torch.tensor([[0.0, 0.0, 40.0, 20.0], [100.0, 100.0, 120.0, 120.0], [60.0, 0.0, 80.0, 20.0]])
    prediction = {"boxes": boxes, "scores": torch.tensor([0.9, 0.8, 0.7]), "labels": torch.tensor([7, 7, 2])}
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.int64)}
    metrics = task.metrics()
    assert metrics.compute()["best_iou"] is None
    metrics.update([prediction], make_target([[0.0, 0.0, 9.0, 9.0]], [IGNORED], (128, 128)))
    assert metrics.compute()["best_iou"] is None
    # two boxes, so two predictions: the perfect third is not used, and the class of the first does not matter
    metrics.update([prediction], target)
    assert metrics.compute()["best_iou"] == pytest.approx((0.5 + 0) / 2)
    metrics.update([empty], target)
    assert metrics.compute()["best_iou"] == pytest.approx((0.25 + 0) / 2)
    metrics.update([prediction], make_target([[0.0, 0.0, 40.0, 20.0]], [1], (128, 128)))
    assert metrics.compute()["best_iou"] == pytest.approx((0.25 + 0 + 1) / 3)
    assert metrics.compute()["ap50"] < 1
    assert box_iou(boxes[:1], target["boxes"][0, :1])[0, 0] == 0.5
