"""A GPU that is not there: what runs on one makes no tensor elsewhere, slips into no other precision, and lets the host
wait for a value once a cycle. Tensors are without content, so whatever needs one fails."""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_leaves

from experiment import build_network
from tasks import TASKS
from train import build_balancer, build_update, choose_autocast
from training.config import LOSS_METHODS, load_config

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))
from _fake_gpu import CountKernels, autocast_as_on_gpu, combine_evenly, fake, make_batch  # noqa: E402

SIZE, COUNT = (160, 96), 2
OPTIONS = {
    "segmentation": {"class_balance": 0.5, "lovasz": 1.0, "dice": 1.0, "head": {"width": 32}},
    "depth": {"head": {"width": 16, "layers": 1, "bins": 8}},
    "detection": {"head": {"width": 32, "layers": 1}},
    "steering": {"horizon": 3},
}
NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "x.yaml").write_text(
        "model: {encoder: {name: test_resnet, pretrained: false, norm: group}, neck: {width: 32, repeats: 1}}\n"
        "tasks: {segmentation: {head: {width: 32}}, depth: {head: {width: 16, layers: 1}}, "
        "detection: {head: {width: 32, layers: 1}}, steering: {}}\n"
        "train: {precision: fp32}\n"
    )
    return lambda *overrides: load_config(
        tmp_path / "x.yaml", list(overrides), {name: task.Options for name, task in TASKS.items()}
    )


def prepare(task):
    task.collect_statistics([])
    return task


def list_tensors(value):
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize("name", TASKS)
def test_heads_losses_and_predictions_stay_on_the_gpu_and_need_no_value(name, config):
    task = prepare(TASKS[name](TASKS[name].Options(**OPTIONS[name])))
    net = build_network(config().model, {name: task}, SIZE, load_pretrained=False).train().to("meta")
    batch, mode = make_batch({name: task}, SIZE, COUNT), FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        net.to_empty(device="cuda")
        image = fake(batch["image"], mode).to("cuda")
        target = torch.utils._pytree.tree_map(lambda leaf: leaf.to("cuda"), fake(batch["targets"][name], mode))
        with autocast_as_on_gpu(True), CountKernels() as counter:
            features = net.shared_features(image, [name])
            # the neck keeps bfloat16 through its norms
            assert {feature.dtype for key, feature in features.items() if key.startswith("neck")} <= {torch.bfloat16}
            leaves = {key: feature.detach().requires_grad_() for key, feature in features.items()}
            output = net.run_head(name, leaves, SIZE[::-1], torch.arange(1, device="cuda"))
            output = net.run_head(name, leaves, SIZE[::-1])
        assert {tensor.dtype for tensor in list_tensors(output) if tensor.is_floating_point()} == {torch.float32}
        with counter:
            loss = task.loss(output, target)
            counts = task.count(target)
            # non-maximum suppression keeps a number of boxes that only the GPU knows
            decode = task.box_coder.decode if name == "detection" else lambda output: task.predict(output, (200, 120))
            prediction = decode(output)
        assert loss.dtype == torch.float32 and loss.shape == () and counts.shape == (COUNT,)
        for tensor in list_tensors((features, output, loss, prediction)):
            assert tensor.device.type == "cuda"
    assert not counter.waits and sum(counter.kernels.values()) > 20


WAITING = {
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "truth": lambda x: bool((x > 0).any()),
    "unique": lambda x: x.unique(),
    "repeat": lambda x: x.repeat_interleave(x.long()),
    "list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("name", WAITING)
def test_the_counter_sees_what_would_wait(name):
    with FakeTensorMode():
        values = torch.zeros(4, device="cuda")
        with CountKernels() as counter, contextlib.suppress(*NEEDS_VALUES):
            WAITING[name](values)
    assert sum(counter.waits.values()) == 1


def count_step(config, method="sum", measure=False):
    """Waits and kernels of a step of four micro-batches, by the rules for a CPU: there is no backward pass without a
    GPU for one."""
    tasks = {name: prepare(task(config.tasks[name])) for name, task in TASKS.items()}
    net = build_network(config.model, tasks, SIZE, load_pretrained=False).train().to("meta")
    batch, mode = make_batch(tasks, SIZE, COUNT), FakeTensorMode(allow_non_fake_inputs=True)
    device, balance = torch.device("cpu"), build_balancer(config, tasks)
    with mode:
        net.to_empty(device="cpu")
        update = build_update(
            config, net, tasks, device, choose_autocast("fp32", device), torch.contiguous_format, balance=balance
        )
        if measure or balance.gradient_method is not None:
            update._combine = combine_evenly
        cycle = [batch | {key: fake(batch[key], mode) for key in ("image", "targets")} for _ in range(4)]
        with CountKernels() as counter:
            update.step(0, cycle, dict.fromkeys(tasks, 1), measure)
    return counter


@pytest.mark.parametrize("method", [*(name for name in LOSS_METHODS if name not in ("uncertainty", "famo")), "mgda"])
def test_the_host_waits_once_in_a_cycle(config, method):
    """Of `uncertainty` and `famo` the Adam is on the host, which this counter cannot tell from a GPU."""
    counter = count_step(config(f"balancing.method={method}"))
    assert dict(counter.waits) == {"aten::tolist": 1}


def test_what_a_cycle_launches_more_for_methods_and_measures_is_bounded(config):
    plain, measured = count_step(config()), count_step(config(), measure=True)
    assert dict(measured.waits) == {"aten::tolist": 1}
    kernels, more = (sum(each.kernels.values()) for each in (plain, measured))
    assert kernels < more < 2.5 * kernels
