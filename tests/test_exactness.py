"""What each task's loss costs, by hand and by brute force, and whether each head learns: one step, and four frames."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from a2d2.calibration import load_calibration
from a2d2.dataset import Geometry
from a2d2.derive import Recipe, derive_boxes, derive_camera, derive_depth, derive_segmentation, derive_steering
from a2d2.frames import Frame, list_frames
from a2d2.images import read_image, write_json
from a2d2.synthetic.writer import write_dataset
from experiment import build_network
from models.heads import DetectionOutput
from tasks import TASKS
from tasks.depth import Depth, silog_losses
from tasks.detection import Detection
from tasks.segmentation import Segmentation, measure_dice, measure_lovasz
from tasks.steering import Steering
from training.config import Model

SIZE = (128, 64)
SAME, MIRROR = Geometry.identity(SIZE), Geometry(SIZE, (0, 0, *SIZE), SIZE, flip=True)
LOG2 = math.log(2)


# By hand


def make_logits(probabilities):
    """Logits (1, 19, 1, n) that give the first classes these probabilities (n, c) at each pixel, the others none."""
    logits = torch.full((1, 19, 1, len(probabilities)), -100.0)
    for pixel, values in enumerate(probabilities):
        logits[0, : len(values), 0, pixel] = torch.tensor(values).log()
    return logits


def test_segmentation_by_hand():
    """Of three pixels one counts for nothing; the others' true classes have the probabilities 1/2 and 1/4."""
    logits = make_logits([(1 / 2, 1 / 2), (3 / 4, 1 / 4), (1 / 2, 1 / 2)])
    target = torch.tensor([[[0, 1, 255]]], dtype=torch.uint8)
    entropy = LOG2 + 2 * LOG2
    assert Segmentation().loss(logits, target).item() == pytest.approx(entropy, rel=1e-6)
    weighted = Segmentation(label_statistics={"class_weights": [2.0, 3.0] + [1.0] * 17})
    assert weighted.loss(logits, target).item() == pytest.approx(2 * LOG2 + 3 * 2 * LOG2, rel=1e-6)
    # Dice: 2 * 1/2 / (5/4 + 1) = 4/9 for the one class, 2 * 1/4 / (3/4 + 1) = 2/7 for the other; times two pixels
    dice = 2 * (1 - (4 / 9 + 2 / 7) / 2)
    # Lovasz: errors are 1/2 and 3/4 for both classes. The pixel of 3/4 wrong alone leaves class 0 half of its union and
    # class 1 nothing; both wrong leave neither anything: 3/4 * 1/2 + 1/2 * 1/2 and 3/4 * 1 + 1/2 * 0
    lovasz = 2 * (5 / 8 + 3 / 4) / 2
    options = Segmentation.Options(lovasz=0.5, dice=2.0)
    assert Segmentation(options).loss(logits, target).item() == pytest.approx(
        entropy + 0.5 * lovasz + 2 * dice, rel=1e-6
    )


def test_depth_by_hand():
    """A pure factor of two, on one point or all of them: (1 - lambda) * log(2) ** 2 for each image, 0.2402 at 1/2."""
    target = torch.zeros(3, 4, 6)
    target[0, 1, 2], target[1, ::2, ::3] = 7.0, torch.tensor([[3.0, 40.0], [79.0, 12.0]])  # and none in the third
    output = torch.where(target > 0, 2 * target, 5.0).log()
    assert Depth().count(target).tolist() == [1, 1, 0]
    assert Depth().loss(output, target).item() == pytest.approx(2 * 0.240227, rel=1e-5)
    for lam, cost in ((0.0, 2 * LOG2**2), (0.85, 2 * 0.15 * LOG2**2), (1.0, 0.0)):
        task = Depth(Depth.Options(silog_lambda=lam))
        assert task.loss(output, target).item() == pytest.approx(cost, rel=1e-5, abs=1e-6)


def test_detection_by_hand():
    """Two locations, one class. The left one is positive and predicts a box over the whole image."""
    task = Detection(Detection.Options(classes="object", head={"reads": ("neck.8",)}))
    label = [{"box": [0, 0, 10, 8], "class": "Car", "visible": 1.0}]
    target = default_collate([task.prepare_loss(task.transform(label, Geometry.identity((16, 8))))])
    boxes = torch.tensor([[[4.0, 4.0, 12.0, 4.0], [9.0, 9.0, 9.0, 9.0]]])
    centreness = torch.tensor([[math.log(3), 50.0]])
    output = DetectionOutput(torch.zeros(1, 2, 1), boxes, centreness, (8,), (8, 16))
    assert task.count(target) == 1
    # focal loss of even odds: 1/4 * (1/2)^2 * log 2 for the box, 3/4 * (1/2)^2 * log 2 for the background
    focal = LOG2 / 4
    giou = 1 - 10 / 16  # the box lies within the prediction, which is their hull, so GIoU is IoU
    centre = math.sqrt(4 / 6)  # as near to the left edge as 4 of 6 to the right; predicted as 3/4
    central = -centre * math.log(3 / 4) - (1 - centre) * math.log(1 / 4)
    assert task.loss(output, target).item() == pytest.approx(focal + giou + central, rel=1e-5)


def test_steering_by_hand():
    """Errors of 1/2 and 3 units of 10 degrees."""
    label_statistics = {"scale_deg": 10.0}
    output, target = torch.tensor([[1.0], [-1.0]]), torch.tensor([[5.0], [20.0]])
    assert Steering(label_statistics=label_statistics).loss(output, target).item() == pytest.approx(
        0.5 * 0.5**2 + (3 - 0.5)
    )
    absolute = Steering(Steering.Options(loss="l1"), label_statistics)
    assert absolute.loss(output, target).item() == pytest.approx(0.5 + 3)
    horizon = Steering(Steering.Options(loss="l1", horizon=2), label_statistics)  # its mean, for each frame
    assert horizon.loss(output.view(1, 2), target.view(1, 2)).item() == pytest.approx((0.5 + 3) / 2)
    assert horizon.count(target.view(1, 2)) == 1


# By brute force


def test_silog_is_its_formula_and_blind_to_scale_at_lambda_one():
    rng = np.random.default_rng(0)
    depth, ratio = rng.uniform(1, 79, (3, 20, 30)), rng.uniform(0.3, 3, (3, 20, 30))
    seen = rng.random((3, 20, 30)) < 0.05
    target = torch.from_numpy(np.where(seen, depth, 0))
    output = torch.from_numpy(np.log(depth * ratio))
    for lam in (0.0, 0.5, 1.0):
        expected = []
        for image in range(3):
            d = np.log(ratio[image][seen[image]])
            expected.append(np.mean(d**2) - lam * np.mean(d) ** 2)
        found = silog_losses(output, target, target > 0, lam)
        assert found.tolist() == pytest.approx(expected, rel=1e-9)
        scaled = silog_losses(output + torch.tensor([0.5, -1.0, 3.0]).view(3, 1, 1), target, target > 0, lam)
        assert scaled.tolist() == pytest.approx(expected, rel=1e-9) if lam == 1 else not torch.allclose(scaled, found)


def test_silog_is_right_in_float32_where_the_textbook_form_is_not():
    """A scale far off and a tiny spread: the difference of two large means has lost it."""
    target = torch.linspace(1, 2, 1000).view(1, 10, 100)
    noise = torch.from_numpy(np.random.default_rng(0).normal(0, 1e-4, (1, 10, 100)))
    output = (target.double().log() + 6 + noise).float()
    exact = (output.double() - target.double().log()).var(correction=0)
    assert silog_losses(output, target, target > 0, 1.0).item() == pytest.approx(exact.item(), rel=0.01)


def integrate_lovasz(probabilities, truth):
    """The Lovasz extension as an integral: over all levels t, 1 - IoU of what is left if every pixel whose error
    exceeds t is wrong."""
    errors = [1 - p if is_true else p for p, is_true in zip(probabilities, truth, strict=True)]
    total, below = 0.0, 0.0
    for level in sorted(set(errors)):
        wrong = [error >= level for error in errors]
        predicted = [is_true != is_wrong for is_true, is_wrong in zip(truth, wrong, strict=True)]
        common = sum(a and b for a, b in zip(predicted, truth, strict=True))
        either = sum(a or b for a, b in zip(predicted, truth, strict=True))
        total += (level - below) * (1 - common / either)
        below = level
    return total


def test_lovasz_and_dice_are_their_definitions():
    rng = np.random.default_rng(1)
    task = Segmentation()
    logits = torch.from_numpy(rng.normal(0, 2, (3, 19, 6, 8)))
    target = torch.from_numpy(rng.choice([0, 3, 4, 18, 255], (3, 6, 8)).astype(np.uint8))
    target[1], target[2] = 255, torch.where(target[2] == 18, 255, target[2])
    expected = {"lovasz": 0.0, "dice": 0.0}
    for image, label in zip(logits.softmax(dim=1).numpy(), target.numpy(), strict=True):
        valid = label != 255
        classes = np.unique(label[valid])
        for kind in classes:
            predicted, truth = image[kind][valid].tolist(), (label[valid] == kind).tolist()
            share = valid.sum() / len(classes)
            expected["lovasz"] += share * integrate_lovasz(predicted, truth)
            common = sum(p for p, is_true in zip(predicted, truth, strict=True) if is_true)
            expected["dice"] += share * (1 - 2 * common / (sum(predicted) + sum(truth)))
    plain = task.loss(logits, target)
    for name, value in expected.items():
        term = Segmentation(Segmentation.Options(**{name: 3.0})).loss(logits, target) - plain
        assert term.item() == pytest.approx(3 * value, rel=1e-9)


def test_of_certain_predictions_lovasz_is_one_minus_iou_and_dice_one_minus_dice():
    rng = np.random.default_rng(2)
    prediction, label = (torch.from_numpy(rng.integers(0, 3, 500)) for _ in range(2))
    predicted, truth = (F.one_hot(kinds, 3).T for kinds in (prediction, label))
    common, both = (predicted * truth).sum(dim=1), predicted.sum(dim=1) + truth.sum(dim=1)
    iou, dice = (common / (both - common)).mean(), (2 * common / both).mean()
    assert measure_lovasz(predicted.float(), truth.bool()).item() == pytest.approx(1 - iou.item(), rel=1e-5)
    assert measure_dice(predicted.float(), truth.bool()).item() == pytest.approx(1 - dice.item(), rel=1e-5)


def test_the_terms_of_regions_do_not_depend_on_how_images_are_batched():
    torch.manual_seed(0)
    task = Segmentation(Segmentation.Options(lovasz=1.0, dice=1.0))
    logits = torch.randn(4, 19, 8, 12, dtype=torch.float64)
    target = torch.randint(0, 19, (4, 8, 12), dtype=torch.uint8)
    target[1, :6], target[2] = 255, 255
    together = task.loss(logits, target)
    apart = sum(task.loss(logits[row : row + 1], target[row : row + 1]) for row in range(4))
    torch.testing.assert_close(together, apart)
    assert task.loss(logits[2:3], target[2:3]) == 0


# Mirrored


@pytest.mark.parametrize(
    "task",
    [
        Segmentation(),
        Segmentation(Segmentation.Options(lovasz=1.0, dice=1.0)),
        Depth(),
        Steering(label_statistics={"scale_deg": 7.0}),
        Steering(Steering.Options(horizon=4, loss="l1"), {"scale_deg": 7.0}),
    ],
    ids=["segmentation", "regions", "depth", "steering", "horizon"],
)
def test_mirrored_outputs_and_labels_cost_the_same(task):
    """Maps mirror, numbers change their sign. Detection, whose distances swap, has its own in test_tasks.py."""
    torch.manual_seed(0)
    rng = np.random.default_rng(3)
    width, height = SIZE
    if task.output_format == "map":
        label = rng.choice([*range(19), 255], (height, width)).astype(np.uint8)
        output = torch.randn(1, 19, height, width, dtype=torch.float64)
    elif task.output_format == "log_depth":
        label = np.where(rng.random((height, width)) < 0.1, rng.uniform(2, 90, (height, width)), 0).astype(np.float32)
        output = torch.randn(1, height, width, dtype=torch.float64)
    else:
        label = rng.normal(0, 20, task.options.horizon).astype(np.float32)
        output = torch.randn(1, task.options.horizon, dtype=torch.float64)
    target, mirrored = (default_collate([task.transform(label, geometry)]) for geometry in (SAME, MIRROR))
    turned = -output if task.output_format == "numbers" else output.flip(-1)
    assert task.count(target).sum() == task.count(mirrored).sum() > 0
    torch.testing.assert_close(task.loss(turned, mirrored), task.loss(output, target))
    assert task.loss(output, mirrored).item() != pytest.approx(task.loss(output, target).item(), rel=1e-3)


# The angle's horizon


def write_steering(root, name, **content):
    frame = Frame("20180101_000000", "front_center", name, root)
    write_json(frame.path("steering"), content)
    return frame


def test_horizon_begins_at_the_frames_own_sample_and_repeats_the_last(tmp_path):
    task = Steering(Steering.Options(horizon=4))
    times = [1000, 2000, 3000, 4000, 5000, 6000]
    angles = [7.0, 1.0, 1.0, 2.0, 7.0, 3.0]

    def load(name, angle):
        content = {"angle_deg": angle, "angles_deg": angles, "timestamps_us": times}
        return task.load(write_steering(tmp_path, name, **content)).tolist()

    assert load("000000001", 2.0) == [2, 7, 3, 3]
    assert load("000000002", 3.0) == [3, 3, 3, 3]
    # of equal samples the one nearest the middle, 3500
    assert load("000000003", 1.0) == [1, 2, 7, 3]
    assert load("000000005", 7.0) == [7, 3, 3, 3]
    assert task.blank(SIZE).shape == (4,) and task.head_arguments() == {"outputs": 4}
    with pytest.raises(ValueError, match=r"000000007\.json: its angle_deg is none of its angles_deg; delete"):
        load("000000007", 2.5)
    with pytest.raises(ValueError, match=r"000000008\.json has no 'angles_deg'; delete"):
        task.load(write_steering(tmp_path, "000000008", angle_deg=1.0))
    assert Steering().load(write_steering(tmp_path, "000000009", angle_deg=1.0)).tolist() == [1]


def test_horizon_is_scored_beside_the_angle_at_the_frames_time():
    task = Steering(Steering.Options(horizon=3, scale_deg=4.0))
    task.collect_statistics([np.array([1.0, 50, 60], np.float32), np.array([3.0, 80, 90], np.float32)])
    assert task.label_statistics == {"constant": 2.0, "scale_deg": 4.0}
    target = torch.tensor([[1.0, 50, 60], [3.0, 80, 90]])
    prediction = task.predict(torch.tensor([[0.5, 12.5, 15.0], [0.5, 20.0, 20.0]]), SIZE)
    metrics = task.metrics()
    metrics.update(prediction, target)
    scores = metrics.compute()
    assert scores["mae"] == 1 and scores["rmse"] == 1
    assert scores["mae/horizon"] == pytest.approx((1 + 0 + 0 + 1 + 0 + 10) / 6)
    assert task.predict_constant(target).eq(2).all()


# Learning, on cut-outs of synthetic frames


DERIVED = (512, 320)
# A head at stride 4 cannot represent a small image of a whole scene exactly: a free map of log-depth in place of the
# network, optimized on such labels at 128x80, ends at AbsRel 0.075, and free logits at mIoU 0.89. On a crop of a larger
# image, in the lower left, where things are near and of many classes, they reach 0.015 and 0.97.
CUT = Geometry(DERIVED, (0, 192, 128, 80), (128, 80))
DENSE = {"reads": ("neck.8", "neck.16", "neck.32"), "width": 64, "layers": 2}
OPTIONS = {
    "segmentation": {"class_balance": 0.5, "lovasz": 1.0, "head": {"width": 64}},
    "depth": {"head": {"layers": 1}},
    "detection": {"head": DENSE},
    "steering": {},
}


@pytest.fixture(scope="module")
def frames(tmp_path_factory):
    """Derived frames, some without some labels."""
    out = tmp_path_factory.mktemp("set")
    write_dataset(out, scenes=4, frames=2, size=(480, 304), workers=1)
    raw = out / "camera_lidar_semantic_bboxes"
    cameras = load_calibration(raw / "cams_lidars.json").cameras
    cameras = {name: camera.resize(DERIVED) for name, camera in cameras.items()}
    recipe = Recipe(out / "derived", cameras, {"format": "png"}, out / "camera_lidar_semantic_bus")
    frames = list_frames(raw, "camera", ["front_center"])
    for frame in frames:
        for derive in (derive_camera, derive_segmentation, derive_depth, derive_boxes):
            derive(frame, recipe)
        derive_steering([frame], recipe)
    return [frame.under(recipe.out) for frame in frames]


def load_four(frames, name, **options):
    """A task with its label statistics, and up to four images (n, 3, 80, 128) whose targets have a count above 0."""
    task = TASKS[name](TASKS[name].Options(**{**OPTIONS[name], **options}))
    labelled = [frame for frame in frames if task.has_label(frame)]
    labels = [task.load(frame) for frame in labelled]
    task.collect_statistics(labels)
    images, targets = [], []
    for frame, label in zip(labelled, labels, strict=True):
        image = torch.from_numpy(read_image(frame.path("image_lossless"))).permute(2, 0, 1)
        target = task.prepare_loss(task.transform(label, CUT))
        if task.count(default_collate([target])) > 0:
            images.append(CUT.transform_image(image))
            targets.append(target)
    return task, torch.stack(images[:4]), default_collate(targets[:4])


def build_alone(task):
    """A small network with this task's head, none of whose layers starts at zero but for the adapters'."""
    torch.manual_seed(0)
    encoder = {"name": "resnet18", "pretrained": False, "norm": "group"}
    net = build_network(Model(encoder=encoder, neck={"width": 64, "repeats": 1}), {task.name: task}, CUT.size)
    for name, parameter in net.heads.named_parameters():
        if "adapters" not in name and parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.01)
    return net


def measure_loss(net, task, images, targets):
    return task.loss(net(images)[task.name], targets) / task.count(targets).sum()


@pytest.mark.parametrize("name", TASKS)
def test_one_step_down_the_gradient_lowers_the_loss_as_it_foretells(name, frames):
    task, images, targets = load_four(frames, name)
    net = build_alone(task)
    before = measure_loss(net, task, images, targets)
    before.backward()
    steepness = sum(parameter.grad.square().sum() for parameter in net.parameters() if parameter.grad is not None)
    expected = 1e-3 * before.item()
    torch.optim.SGD(net.parameters(), lr=expected / steepness.item()).step()
    with torch.no_grad():
        after = measure_loss(net, task, images, targets)
    assert before.item() - after.item() == pytest.approx(expected, rel=0.3)


def to_tensors(output):
    return [output] if isinstance(output, torch.Tensor) else [part for part in output if isinstance(part, torch.Tensor)]


@pytest.mark.parametrize("name", TASKS)
def test_options_that_all_heads_have(name, frames):
    """`stop_gradient` spares encoder and neck, `adapter` starts as the identity and learns."""
    task, images, targets = load_four(frames, name)
    net = build_alone(task)
    measure_loss(net, task, images, targets).backward()
    assert sum(parameter.grad.abs().sum() for parameter in net.encoder.parameters()) > 0

    head = task.options.head.model_dump()
    task, images, targets = load_four(frames, name, head={**head, "stop_gradient": True, "adapter": True})
    changed = build_alone(task)
    missing, unexpected = changed.load_state_dict(net.state_dict(), strict=False)
    assert unexpected == [] and len(missing) == 4 * len(head["reads"]) and all(".adapters." in key for key in missing)
    with torch.no_grad():
        outputs = (to_tensors(found(images)[name]) for found in (net, changed))
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))
    measure_loss(changed, task, images, targets).backward()
    assert all(parameter.grad is None for parameter in changed.shared_parameters())
    assert all(adapter.change[-1].weight.grad.any() for adapter in changed.heads[name].adapters)


@pytest.mark.parametrize("name", TASKS)
def test_levels_width_and_layers_of_each_head_are_options(name, frames):
    chosen = {"reads": ("neck.8", "neck.32"), "width": 32, "layers": 2}
    sizes = {}
    changes = {"": {}, "reads": {"reads": ("neck.8",)}, "width": {"width": 64}, "layers": {"layers": 3}}
    for key, change in changes.items():
        task, images, targets = load_four(frames, name, head={**chosen, **change})
        net = build_alone(task)
        assert net.heads[name].reads == task.options.head.reads
        measure_loss(net, task, images, targets).backward()
        assert all(parameter.grad is not None for parameter in net.head_parameters(name))
        sizes[key] = sum(parameter.numel() for parameter in net.head_parameters(name))
    assert sizes["reads"] < sizes[""] < min(sizes["width"], sizes["layers"])


@pytest.mark.parametrize(
    ("name", "steps", "rate", "score", "bar"),
    [
        ("segmentation", 110, 8e-3, "miou", 0.9),
        ("depth", 130, 4e-3, "abs_rel", 0.05),
        ("detection", 50, 4e-3, "ap50", 0.9),
        ("steering", 60, 4e-3, "mae", 1.0),
    ],
)
def test_each_head_alone_learns_four_frames_by_heart(name, steps, rate, score, bar, frames):
    task, images, targets = load_four(frames, name)
    assert len(images) == 4
    net = build_alone(task)
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.2)
    for _ in range(steps):
        optimizer.zero_grad()
        measure_loss(net, task, images, targets).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        schedule.step()
    metrics = task.metrics()
    with torch.no_grad():
        metrics.update(task.predict(net.eval()(images)[name], CUT.size), targets)
    found = metrics.compute()[score]
    assert found > bar if task.better == "higher" else found < bar
