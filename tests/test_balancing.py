"""The update of one cycle against plain autograd on the whole sum, and loss weights by hand."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

from models.multitask import MultitaskNet
from training.balancing import LossWeights, NonFiniteError, backward_cycle, find_rows, take_rows

NAMES = ("a", "b", "c")
LABELLED = {"a": [True, True, False, True], "b": [False, True, True, False], "c": [False] * 4}
FIXED = {"a": 1.0, "b": 0.3, "c": 2.0}


class Backbone(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SiLU(), nn.Conv2d(4, 4, 1))

    def forward(self, image):
        return {"encoder.1": self.layers(image)}


class Mean(nn.Module):
    reads = ("encoder.1",)

    def __init__(self, stop_gradient=False):
        super().__init__()
        self.layer = nn.Linear(4, 1)
        self.stop_gradient = stop_gradient

    def forward(self, features, size):
        read = features["encoder.1"]
        read = read.detach() if self.stop_gradient else read
        return self.layer(read.mean(dim=(2, 3)))[:, 0]


class Square:
    """A task of one number a row; it counts more than rows, as pixels do."""

    def count(self, target):
        return int(target["weight"].sum())

    def loss(self, output, target):
        return (target["weight"] * (output - target["value"]) ** 2).sum()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return MultitaskNet(Backbone(), None, {name: Mean() for name in NAMES}).double()


@pytest.fixture
def data():
    torch.manual_seed(1)
    return {
        "image": torch.rand(4, 3, 2, 2).double(),
        "target": {"value": torch.rand(4).double(), "weight": torch.tensor([1, 5, 2, 3])},
    }


def make_batch(data, rows, labelled=LABELLED):
    rows = torch.tensor(rows)
    return {
        "image": data["image"][rows],
        "targets": {name: take_rows(data["target"], rows) for name in NAMES},
        "labelled": {name: torch.tensor(labelled[name])[rows] for name in NAMES},
        "frame": [f"frame {row}" for row in rows.tolist()],
    }


def run_cycle(net, cycle, weights=FIXED):
    net.zero_grad(set_to_none=True)
    losses = backward_cycle(net, cycle, dict.fromkeys(NAMES, Square()), weights, torch.device("cpu"), nullcontext)
    return losses, {name: parameter.grad for name, parameter in net.named_parameters()}


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
    losses, gradients = run_cycle(net, [make_batch(data, rows) for rows in parts])
    assert losses == pytest.approx(wanted_losses, rel=1e-12)
    for name, gradient in wanted.items():
        if gradient is None:
            assert gradients[name] is None, name
        else:
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-11, atol=1e-14)


def test_a_task_without_labels_is_left_out_and_its_head_untouched(net, data):
    losses, gradients = run_cycle(net, [make_batch(data, [0, 1, 2, 3])])
    assert set(losses) == {"a", "b"}
    absent = {name for name, gradient in gradients.items() if gradient is None}
    assert absent == {name for name in gradients if name.startswith("heads.c.")} != set()


def test_a_batch_without_any_label_adds_nothing(net, data):
    _, alone = run_cycle(net, [make_batch(data, [0, 1])])
    bare = make_batch(data, [2, 3], dict.fromkeys(NAMES, [False] * 4))
    _, with_bare = run_cycle(net, [make_batch(data, [0, 1]), bare])
    for name, gradient in alone.items():
        assert gradient is None if with_bare[name] is None else torch.equal(gradient, with_bare[name])
    losses, gradients = run_cycle(net, [bare])
    assert losses == {} and all(gradient is None for gradient in gradients.values())


def test_a_head_that_stops_the_gradient_may_be_alone_in_a_micro_batch(data):
    torch.manual_seed(0)
    net = MultitaskNet(Backbone(), None, {name: Mean(stop_gradient=True) for name in NAMES}).double()
    losses, gradients = run_cycle(net, [make_batch(data, [0, 3])])
    assert set(losses) == {"a"} and gradients["heads.a.layer.weight"].abs().sum() > 0
    assert all(gradient is None for name, gradient in gradients.items() if name.startswith("encoder."))


def test_what_is_not_finite_names_the_task_and_only_its_frames(net, data):
    data["target"]["value"][2] = torch.nan
    before = [parameter.clone() for parameter in net.parameters()]
    with pytest.raises(NonFiniteError) as caught:
        run_cycle(net, [make_batch(data, [0]), make_batch(data, [2]), make_batch(data, [1])])
    # frame 2 carries only the label of b, and the other micro-batches are sound
    assert "loss of b " in str(caught.value) and "frame 2" in str(caught.value)
    assert "frame 0" not in str(caught.value) and "frame 1" not in str(caught.value)
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters(), strict=True))


def test_rows_are_those_with_the_label(data):
    rows = find_rows(make_batch(data, [0, 1, 2, 3]))
    assert {name: found.tolist() for name, found in rows.items()} == {"a": [0, 1, 3], "b": [1, 2]}


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
