"""The update of one cycle against plain autograd on the whole sum, and loss weights by hand."""

import copy

import pytest
import torch
from small_net import (
    NAMES,
    Backbone,
    Mean,
    Square,
    build_backward,
    build_net,
    build_update,
    count_cycle,
    make_batch,
    take_step,
)
from torch import nn
from torch.utils._pytree import tree_map

from models.multitask import MultitaskNet
from training.balancing import LossWeights, NonFiniteError, Normaliser
from training.config import Schedule, Train
from training.updates import CycleUpdate, find_lr_factor

LABELLED = {"a": [True, True, False, True], "b": [False, True, True, False], "c": [False] * 4}
FIXED = {"a": 1.0, "b": 0.3, "c": 2.0}


@pytest.fixture
def net():
    return build_net()


@pytest.fixture
def data():
    torch.manual_seed(1)
    return {
        "image": torch.rand(4, 3, 2, 2).double(),
        "target": {"value": torch.rand(4).double(), "weight": torch.tensor([1, 5, 2, 3])},
    }


def take_rows(target, rows):
    return tree_map(lambda leaf: leaf[rows], target)


def make_part(data, rows, labelled=LABELLED):
    flags = {name: [labelled[name][row] for row in rows] for name in NAMES}
    image, target = data["image"][rows], take_rows(data["target"], rows)
    return make_batch(image, target, flags, [f"frame {row}" for row in rows])


def run_cycle(net, cycle, weights=FIXED, tasks=None, normaliser=None):
    net.zero_grad(set_to_none=True)
    backward = build_backward(net, tasks)
    divisors = (normaliser or Normaliser(backward.tasks)).find_divisors(count_cycle(NAMES, cycle))
    backward.run(cycle, divisors, weights)
    return backward.read(divisors).losses, {name: parameter.grad for name, parameter in net.named_parameters()}


def run_plainly(net, data):
    """The same by one backward of the whole weighted sum."""
    net.zero_grad(set_to_none=True)
    outputs, total, losses = net(data["image"]), 0.0, {}
    for name in ("a", "b"):
        rows = torch.tensor(LABELLED[name]).nonzero()[:, 0]
        target = take_rows(data["target"], rows)
        losses[name] = Square().loss(outputs[name][rows], target) / target["weight"].sum()
        total = total + FIXED[name] * losses[name]
    total.backward()
    return {name: loss.item() for name, loss in losses.items()}, {
        name: None if parameter.grad is None else parameter.grad.clone() for name, parameter in net.named_parameters()
    }


@pytest.mark.parametrize("parts", [[[0, 1, 2, 3]], [[0], [1], [2], [3]], [[2, 0], [3, 1]], [[1, 3, 0], [2]]])
def test_any_division_into_micro_batches_gives_the_gradient_of_the_whole(net, data, parts):
    wanted_losses, wanted = run_plainly(net, data)
    losses, gradients = run_cycle(net, [make_part(data, rows) for rows in parts])
    assert losses == pytest.approx(wanted_losses, rel=1e-12)
    for name, gradient in wanted.items():
        if gradient is None:
            assert gradients[name] is None, name
        else:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-11, atol=1e-14)


def test_a_task_without_labels_is_left_out_and_its_head_untouched(net, data):
    losses, gradients = run_cycle(net, [make_part(data, [0, 1, 2, 3])])
    assert set(losses) == {"a", "b"}
    absent = {name for name, gradient in gradients.items() if gradient is None}
    assert absent == {name for name in gradients if name.startswith("heads.c.")} != set()


def test_a_batch_without_any_label_adds_nothing(net, data):
    _, alone = run_cycle(net, [make_part(data, [0, 1])])
    bare = make_part(data, [2, 3], dict.fromkeys(NAMES, [False] * 4))
    _, with_bare = run_cycle(net, [make_part(data, [0, 1]), bare])
    for name, gradient in alone.items():
        assert gradient is None if with_bare[name] is None else torch.equal(gradient, with_bare[name])
    losses, gradients = run_cycle(net, [bare])
    assert losses == {} and all(gradient is None for gradient in gradients.values())


def test_a_head_that_stops_the_gradient_may_be_alone_in_a_micro_batch(data):
    torch.manual_seed(0)
    net = MultitaskNet(Backbone(), None, {name: Mean(stop_gradient=True) for name in NAMES}).double()
    losses, gradients = run_cycle(net, [make_part(data, [0, 3])])
    assert set(losses) == {"a"} and gradients["heads.a.layer.weight"].abs().sum() > 0
    assert all(gradient is None for name, gradient in gradients.items() if name.startswith("encoder."))


def test_what_is_not_finite_names_the_task_and_only_its_frames(net, data):
    data["target"]["value"][2] = torch.nan
    before = [parameter.clone() for parameter in net.parameters()]
    with pytest.raises(NonFiniteError) as caught:
        run_cycle(net, [make_part(data, [0]), make_part(data, [2]), make_part(data, [1])])
    # frame 2 carries only the label of b, and the other micro-batches are sound
    assert "loss of b " in str(caught.value) and "frame 2" in str(caught.value)
    assert "frame 0" not in str(caught.value) and "frame 1" not in str(caught.value)
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))


def test_losses_are_divided_by_their_first_mean_and_the_state_goes_on():
    weights = LossWeights(NAMES, {"a": 2.0}, "init", window=2)
    assert weights.weights() == {"a": 2.0, "b": 1.0, "c": 1.0}
    weights.observe({"a": 4.0, "b": 0.5})
    weights.observe({"a": 2.0})
    weights.observe({"a": 1000.0})  # after the window: no longer looked at
    assert weights.weights() == pytest.approx({"a": 2 / 3, "b": 2.0, "c": 1.0})
    again = LossWeights(NAMES, {"a": 2.0}, "init", window=2)
    again.load_state_dict(weights.state_dict())
    for each in (weights, again):
        each.observe({"b": 1.5, "a": 7.0})
    assert again.weights() == weights.weights() == pytest.approx({"a": 2 / 3, "b": 1.0, "c": 1.0})


def test_without_normalising_weights_are_those_given():
    weights = LossWeights(NAMES, {"b": 0.0})
    weights.observe({"a": 9.0})
    assert weights.weights() == {"a": 1.0, "b": 0.0, "c": 1.0}


class Positives:
    """A task whose empty frames have a loss, as detection: it counts positives, of which a frame may have none."""

    learns_from_empty = True

    def count(self, target):
        return target["weight"]

    def loss(self, output, target):
        return ((output - target["value"]) ** 2 * (target["weight"] + 1)).sum()


def run_with_normaliser(net, cycle, tasks, normaliser):
    losses, gradients = run_cycle(net, cycle, FIXED, tasks, normaliser)
    return losses, float(nn.utils.get_total_norm([each for each in gradients.values() if each is not None]))


def test_a_cycle_of_empty_frames_is_divided_by_the_mean_count_of_the_others(net, data):
    tasks = dict.fromkeys(NAMES, Positives())
    normaliser = Normaliser(tasks)
    data["target"]["weight"] = torch.tensor([40, 60, 0, 0])
    labelled = {"a": [True] * 4, "b": [False] * 4, "c": [False] * 4}
    # before any positive has been met there is nothing to divide by, so the task waits
    losses, _ = run_with_normaliser(net, [make_part(data, [2, 3], labelled)], tasks, normaliser)
    assert losses == {}
    _, usual = run_with_normaliser(net, [make_part(data, [0], labelled)], tasks, normaliser)
    run_with_normaliser(net, [make_part(data, [1], labelled)], tasks, normaliser)
    losses, empty = run_with_normaliser(net, [make_part(data, [2, 3], labelled)], tasks, normaliser)
    rows = torch.tensor([2, 3])
    with torch.no_grad():
        plain = Positives().loss(net(data["image"])["a"][rows], take_rows(data["target"], rows))
    assert losses["a"] == pytest.approx(float(plain) / 50, rel=1e-12)
    assert empty < usual
    again = Normaliser(tasks)
    again.load_state_dict(normaliser.state_dict())
    assert again.find_divisors({"a": 0}) == normaliser.find_divisors({"a": 0}) == {"a": 50.0}


def test_a_label_that_says_nothing_is_an_absent_label(net, data):
    """A class map that is all ignored, a depth image without a point: no gradients, so AdamW leaves the head alone."""
    data["target"]["weight"] = torch.zeros(4, dtype=torch.long)
    losses, gradients = run_cycle(net, [make_part(data, [0, 1, 2, 3])])
    assert losses == {} and all(gradient is None for gradient in gradients.values())
    weights = LossWeights(NAMES, {}, "init")
    weights.observe(losses)
    assert weights.weights() == dict.fromkeys(NAMES, 1.0)


def test_a_frozen_encoder_leaves_the_heads_trainable(net, data):
    _, whole = run_cycle(net, [make_part(data, [0, 1, 2, 3])])
    for parameter in net.encoder.parameters():
        parameter.requires_grad_(False)
    _, frozen = run_cycle(net, [make_part(data, [0, 1, 2, 3])])
    for name, gradient in frozen.items():
        if name.startswith("encoder."):
            assert gradient is None
        else:
            assert gradient is None if whole[name] is None else torch.equal(gradient, whole[name])


def test_fp16_scales_its_losses_and_makes_the_same_step_without_rounding(net, data):
    """In float64 the scale is a power of two that comes out again exactly."""
    steps = {}
    for precision in ("fp32", "fp16"):
        trained = copy.deepcopy(net)
        options = Train(
            steps=10, precision=precision, schedule={"warmup_steps": 0}, optimizer={"lr": 0.01, "clip": None}
        )
        update = build_update(CycleUpdate, options, trained, FIXED)
        losses, measures = take_step(update, 0, [make_part(data, [0, 1, 2, 3])])
        steps[precision] = (losses, measures, list(trained.parameters()))
    assert steps["fp16"][:2] == steps["fp32"][:2]
    assert all(torch.equal(one, other) for one, other in zip(steps["fp16"][2], steps["fp32"][2], strict=True))
    assert not all(torch.equal(one, other) for one, other in zip(steps["fp16"][2], net.parameters(), strict=True))


@pytest.mark.parametrize(("steps", "warmup"), [(10, 3), (280, 30), (2, 1), (60000, 500)])
def test_the_learning_rate_ends_at_its_final_factor(steps, warmup):
    schedule = Schedule(warmup_steps=warmup, final_factor=0.25)
    factors = [find_lr_factor(step, steps, schedule) for step in range(steps)]
    assert factors[-1] == pytest.approx(0.25) and max(factors) == pytest.approx(1.0)
    assert factors[warmup - 1] == 1.0 and factors[warmup:] == sorted(factors[warmup:], reverse=True)
