"""Balancing: every method by its properties, those of the papers included, and what a whole run does with them."""

import copy
import json
import math

import pytest
import torch
from small_net import NAMES, build_net, build_update, make_batch, take_step
from tiny_run import are_same_weights, read_log, run_train, stop_at_check

from training import config as schema
from training.balancing import LOSS_METHODS, Balancer
from training.config import Balancing, Train
from training.cycle import GradientRows
from training.gradient_methods import GRADIENT_METHODS
from training.updates import CycleUpdate, describe_gramian

DRAWN = ("pcgrad", "gradvac")  # draw the order of the tasks
INSTALLED = []
for name in GRADIENT_METHODS:
    try:
        Balancer(NAMES, Balancing(method=name))
    except ImportError:
        continue
    INSTALLED.append(name)


def build(method, names=NAMES, **options):
    return Balancer(names, Balancing(method=method, **options))


def make_rows(seed, count=3):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 30, generator=generator, dtype=torch.float64)
    return rows * torch.tensor([1.0, 20.0, 0.05], dtype=torch.float64)[:count, None]


def weigh(method, rows, names=NAMES, step=0):
    found = build(method, names).gradient_method.weigh(step, names, rows @ rows.T)
    return torch.tensor([found[name] for name in names], dtype=torch.float64)


def weigh_in_mean(method, rows, names=NAMES):
    steps = 400 if method in DRAWN else 1
    return torch.stack([weigh(method, rows, names, step) for step in range(steps)]).mean(dim=0)


def test_the_config_knows_the_methods_there_are():
    assert list(schema.LOSS_METHODS) == list(LOSS_METHODS) and list(schema.GRADIENT_METHODS) == list(GRADIENT_METHODS)
    assert set(INSTALLED) >= {"pcgrad", "mgda", "imtlg", "aligned_mtl", "gradvac"}  # without extras


# Gradient side


@pytest.mark.parametrize("method", INSTALLED)
def test_one_task_alone_and_equal_gradients(method):
    assert weigh(method, make_rows(0, 1), NAMES[:1]).tolist() == [1.0]
    equal = weigh_in_mean(method, make_rows(0, 1).expand(3, -1))
    torch.testing.assert_close(equal, equal.mean().expand(3), rtol=1e-6, atol=0)
    assert equal.mean() > 0


@pytest.mark.parametrize("method", INSTALLED)
def test_weights_do_not_depend_on_the_order_of_tasks(method):
    rows, order = make_rows(1), [2, 0, 1]
    turned = weigh_in_mean(method, rows[order], tuple(NAMES[index] for index in order))
    wanted = weigh_in_mean(method, rows)[order]
    bar = 0.05 if method in DRAWN else 1e-6
    assert (turned - wanted).abs().max() <= bar * wanted.abs().max()


@pytest.mark.parametrize("method", INSTALLED)
def test_an_absent_task_and_one_without_gradient_change_nothing_for_the_others(method):
    rows = make_rows(2)
    alone = weigh(method, rows[:2], NAMES[:2], 1)
    several = build(method).gradient_method
    found = several.weigh(1, NAMES[:2], rows[:2] @ rows[:2].T)
    assert [found[name] for name in NAMES[:2]] == alone.tolist()
    with_zero = torch.cat([rows[:2], torch.zeros(1, 30, dtype=torch.float64)])
    torch.testing.assert_close(weigh(method, with_zero, NAMES, 1)[:2], alone, rtol=1e-9, atol=0)
    assert weigh(method, torch.zeros(3, 30, dtype=torch.float64)).tolist() == [1.0] * 3


def test_gradvac_keeps_the_cosines_of_an_absent_task():
    method = build("gradvac").gradient_method
    for step in range(4):
        rows = make_rows(step)
        method.weigh(step, NAMES, rows @ rows.T)
    before = {key: value for key, value in method.state_dict()["targets"].items() if "c" in key}
    assert any(before.values())
    rows = make_rows(9)[:2]
    method.weigh(4, NAMES[:2], rows @ rows.T)
    after = method.state_dict()["targets"]
    assert {key: after[key] for key in before} == before
    assert after["a,b"] != 0


@pytest.mark.parametrize("method", INSTALLED)
def test_a_restored_method_goes_on_to_the_bit_and_touches_no_generator(method):
    one, other = (build(method).gradient_method for _ in range(2))
    for step in range(5):
        rows = make_rows(step)
        one.weigh(step, NAMES, rows @ rows.T)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    rows, state = make_rows(8), torch.get_rng_state()
    assert one.weigh(8, NAMES, rows @ rows.T) == other.weigh(8, NAMES, rows @ rows.T)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("scale", [1e-8, 1e6])
@pytest.mark.parametrize("method", [name for name in INSTALLED if name not in ("fairgrad", "nashmtl")])
def test_scaling_all_losses_alike_changes_no_weight(method, scale):
    rows = make_rows(3)
    torch.testing.assert_close(weigh(method, scale * rows), weigh(method, rows), rtol=1e-6, atol=1e-9)


def test_scaling_one_loss_does_what_the_papers_say():
    """IMTL-G: projections on all gradients stay equal; Aligned-MTL: the sum stays the same; MGDA: the shortest
    combination takes less of a longer gradient; PCGrad: gradients without conflict are added as they are."""
    rows = make_rows(4)
    longer = rows * torch.tensor([50.0, 1.0, 1.0], dtype=torch.float64)[:, None]
    for each in (rows, longer):
        total = weigh("imtlg", each).double() @ each
        along = each @ total / each.norm(dim=1)
        torch.testing.assert_close(along, along.mean().expand(3), rtol=1e-5, atol=0)
        shortest = weigh("mgda", each).double()
        assert shortest.min() >= 0 and shortest.sum() == pytest.approx(1, abs=1e-6)
        trials = torch.rand(500, 3, dtype=torch.float64)
        trials = trials / trials.sum(dim=1, keepdim=True)
        assert (shortest @ each).norm() <= (trials @ each).norm(dim=1).min() * 1.01
        balanced = weigh("aligned_mtl", each).double() @ each
        assert balanced.norm() <= 1.01 * each.norm(dim=1).min()
    apart = torch.eye(3, 30, dtype=torch.float64) * torch.tensor([50.0, 1.0, 2.0], dtype=torch.float64)[:, None]
    assert weigh("pcgrad", apart).tolist() == [1.0] * 3
    one, other = torch.tensor([[1.0, 0.0], [-2.0, 1.0]], dtype=torch.float64)
    conflict = torch.stack([one, other])
    found = weigh("pcgrad", conflict, NAMES[:2]).double() @ conflict
    wanted = (one - (one @ other) / (other @ other) * other) + (other - (one @ other) / (one @ one) * one)
    torch.testing.assert_close(found, wanted)


# Loss side


def feed(balancer, cycles):
    """Let a balancer see cycles of losses; its weights for the next cycle of all tasks."""
    for step, losses in enumerate(cycles):
        balancer.find_weights(step, list(losses))
        balancer.observe(losses)
    return balancer.find_weights(len(cycles), list(balancer.scale.fixed))


CYCLES = [{"a": 1.0 + 0.1 * step, "b": 3.0 / (1 + step), "c": 0.2} for step in range(12)]
OPTIONS = {"dwa": {"window": 3}}


@pytest.mark.parametrize("method", LOSS_METHODS)
def test_loss_methods_start_fair_and_keep_the_state_of_absent_tasks(method):
    options = {"options": OPTIONS.get(method, {})}
    start = build(method, **options).find_weights(0, list(NAMES))
    if method != "rlw":
        assert list(start.values()) == pytest.approx([1.0] * 3)
    assert build(method, **options).find_weights(0, ["b"])["b"] == pytest.approx(1.0)
    # "c" is absent in later cycles: what is known of it is what the first three said
    balancer = build(method, **options)
    feed(balancer, CYCLES[:3])
    known = copy.deepcopy(balancer.state_dict()["loss"])
    feed(balancer, [{name: losses[name] for name in "ab"} for losses in CYCLES[3:]])
    later = balancer.state_dict()["loss"]
    for key, value in known.items():
        if isinstance(value, dict) and "c" in value and method != "label_frequency":
            assert later[key]["c"] == value["c"], key
    with_c = feed(build(method, **options), CYCLES)
    assert set(with_c) == set(NAMES) and all(weight > 0 for weight in with_c.values())


@pytest.mark.parametrize("method", LOSS_METHODS)
def test_a_restored_balancer_goes_on_to_the_bit(method):
    options = {"options": OPTIONS.get(method, {}), "normalise": "running", "weights": {"a": 2.0}}
    one, other = build(method, **options), build(method, **options)
    feed(one, CYCLES[:7])
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert feed(one, CYCLES[7:]) == feed(other, CYCLES[7:])


@pytest.mark.parametrize("method", LOSS_METHODS)
def test_the_order_of_tasks_is_no_matter(method):
    options = {"options": OPTIONS.get(method, {})}
    turned = Balancer(("c", "a", "b"), Balancing(method=method, **options))
    cycles = [{name: losses[name] for name in "cab"} for losses in CYCLES]
    found, wanted = feed(turned, cycles), feed(build(method, **options), CYCLES)
    assert found == pytest.approx(wanted)


def test_what_each_loss_method_does():
    weights = feed(build("uncertainty", options={"lr": 0.05}), [{"a": 4.0, "b": 0.25, "c": 0.5}] * 3000)
    assert weights == pytest.approx({"a": 1 / 8, "b": 2.0, "c": 1.0}, rel=0.02)  # exp(-s) = 1 / (2 loss) is the minimum
    # losses times 1000: the weights follow, the weighted losses are the same
    scaled = feed(build("geometric"), [{"a": 4000.0, "b": 0.25, "c": 0.5}] * 5)
    plain = feed(build("geometric"), [{"a": 4.0, "b": 0.25, "c": 0.5}] * 5)
    assert plain == pytest.approx({name: 0.5 ** (1 / 3) / loss for name, loss in (("a", 4), ("b", 0.25), ("c", 0.5))})
    assert scaled["a"] / scaled["b"] == pytest.approx(plain["a"] / plain["b"] / 1000)
    # of two losses the one that falls more slowly gets more
    slow, fast = [1 - 0.001 * step for step in range(40)], [0.9**step for step in range(40)]
    cycles = [{"a": one, "b": other, "c": one} for one, other in zip(slow, fast, strict=True)]
    for method, options in (("dwa", {"window": 10}), ("famo", {})):
        weights = feed(build(method, options=options), cycles)
        relative = {name: weights[name] * cycles[-1][name] for name in NAMES} if method == "famo" else weights
        assert relative["a"] == pytest.approx(relative["c"]) and relative["a"] > relative["b"]
    # exactly as the paper writes it, from two windows of means
    found = feed(build("dwa", options={"window": 2, "temperature": 2.0}), [{"a": 2.0, "b": 1.0, "c": 1.0}] * 2 + [
        {"a": 1.0, "b": 1.0, "c": 1.0}
    ] * 2)  # fmt: skip
    powers = [math.exp(0.25), math.exp(0.5), math.exp(0.5)]
    assert list(found.values()) == pytest.approx([3 * power / sum(powers) for power in powers])


def test_random_weights_are_new_in_every_step_and_fair_in_the_mean():
    method = build("rlw")
    drawn = torch.tensor([list(method.find_weights(step, list(NAMES)).values()) for step in range(3000)])
    assert torch.allclose(drawn.sum(dim=1), torch.tensor(3.0)) and len(drawn.unique(dim=0)) == 3000
    assert drawn.mean(dim=0).tolist() == pytest.approx([1.0] * 3, abs=0.05)
    assert method.find_weights(7, list(NAMES)) == build("rlw").find_weights(7, list(NAMES))


def test_label_frequency_gives_rare_labels_the_influence_of_frequent_ones():
    method = build("label_frequency", options={"window": 50})
    total = dict.fromkeys(NAMES, 0.0)
    for step in range(2000):
        losses = {"a": 1.0} | ({"b": 1.0} if step % 5 == 0 else {}) | ({"c": 1.0} if step % 100 == 0 else {})
        for name, weight in method.find_weights(step, list(losses)).items():
            total[name] += weight if step >= 200 else 0.0
        method.observe(losses)
    assert total["a"] == pytest.approx(1800) and total["b"] == pytest.approx(1800, rel=0.1)
    assert total["c"] == pytest.approx(18 * 10, rel=0.15)  # at most `limit` times


def test_a_task_of_weight_zero_is_not_balanced_against_the_others():
    for method in LOSS_METHODS:
        options = {"options": OPTIONS.get(method, {})}
        found = feed(build(method, weights={"c": 0.0}, **options), CYCLES)
        without = feed(build(method, NAMES[:2], **options), [{name: each[name] for name in "ab"} for each in CYCLES])
        assert found["c"] == 0 and {name: found[name] for name in "ab"} == pytest.approx(without), method


# Updates


def make_cycles(steps, missing=True):
    torch.manual_seed(3)
    cycles = []
    for step in range(steps):
        labelled = {"a": [True, True], "b": [step % 3 != 0 or not missing] * 2, "c": [True, False]}
        target = {"value": torch.rand(2).double(), "weight": torch.tensor([1, 2])}
        frames = [f"{step} {row}" for row in range(2)]
        cycles.append([make_batch(torch.rand(2, 3, 2, 2).double(), target, labelled, frames) for _ in range(2)])
    return cycles


def train_small(cycles, measure=False, rows="device", **balancing):
    net = build_net()
    options = Train(steps=len(cycles), schedule={"warmup_steps": 0}, optimizer={"lr": 0.01, "clip": None})
    update = build_update(CycleUpdate, options, net, **balancing)
    update.store = rows
    found = [take_step(update, step, cycle, measure) for step, cycle in enumerate(cycles)]
    return net, found


def find_error(net, other):
    return max(((a - b).norm() / b.norm()).item() for a, b in zip(net.parameters(), other.parameters(), strict=True))


def test_gradients_kept_apart_add_up_to_those_of_the_sum():
    cycles = make_cycles(12)
    plain, _ = train_small(cycles, weights={"a": 2.0, "b": 0.3})
    measured, found = train_small(cycles, measure=True, weights={"a": 2.0, "b": 0.3})
    assert find_error(measured, plain) < 1e-12
    for losses, measures in found:
        assert sum(measures[f"gradient/share/{name}"] for name in losses) == pytest.approx(1)
        assert all(abs(value) <= 1 + 1e-9 for key, value in measures.items() if "cosine" in key)
        assert len([key for key in measures if "cosine" in key]) == len(losses) * (len(losses) - 1) // 2


@pytest.mark.parametrize("method", INSTALLED)
def test_a_method_moves_encoder_and_neck_by_its_weights_and_heads_by_their_own_loss(method):
    """One step of plain gradient descent against torch.autograd and the method's weights."""
    cycle = make_cycles(2)[1]
    net = build_net()
    options = Train(steps=1, schedule={"warmup_steps": 1}, optimizer={"lr": 0.01, "clip": None})
    update = build_update(CycleUpdate, options, net, method=method)
    update.optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    for group in update.optimizer.param_groups:
        group["base_lr"] = 1.0
    plain = copy.deepcopy(net)
    shared, rows, heads = plain.shared_parameters(), [], {}
    for name in NAMES:
        plain.zero_grad(set_to_none=True)
        count = sum(int(batch["counts"][name].sum()) for batch in cycle)
        for batch in cycle:
            output = plain(batch["image"], {name: batch["rows"][name]})[name]
            target = batch["targets"][name]
            ((target["weight"] * (output - target["value"]) ** 2).sum() / count).backward()
        rows.append(torch.cat([parameter.grad.flatten() for parameter in shared]))
        heads |= {parameter: parameter.grad for parameter in plain.head_parameters(name)}
    weights = build(method).gradient_method.weigh(0, NAMES, torch.stack(rows) @ torch.stack(rows).T)
    total = sum(weights[name] * row for name, row in zip(NAMES, rows, strict=True))
    take_step(update, 0, cycle)
    moved = torch.cat([(old - new).flatten() for old, new in zip(shared, net.shared_parameters(), strict=True)])
    torch.testing.assert_close(moved, total.detach(), rtol=1e-9, atol=1e-12)
    for name in NAMES:
        for old, new in zip(plain.head_parameters(name), net.head_parameters(name), strict=True):
            torch.testing.assert_close(old - new, heads[old], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("rows", ["bf16", "cpu"])
def test_where_rows_are_kept_changes_their_precision_alone(rows):
    cycles = make_cycles(6)
    device, _ = train_small(cycles, method="imtlg")
    other, _ = train_small(cycles, rows=rows, method="imtlg")
    error = find_error(other, device)
    assert error == 0 if rows == "cpu" else 0 < error < 0.05


def test_rows_take_half_of_the_memory_in_bf16():
    parameters = [torch.nn.Parameter(torch.zeros(10, 10)), torch.nn.Parameter(torch.zeros(7), requires_grad=False)]
    for store, size in (("device", 400), ("bf16", 200), ("cpu", 400)):
        kept = GradientRows(parameters, store)
        kept.clear(["a", "b"])
        assert [row.nbytes for row in kept.rows.values()] == [size, size]


def test_a_parameter_that_no_task_reaches_has_no_gradient():
    net = build_net()
    unused = torch.nn.Parameter(torch.ones(3).double())
    net.encoder.register_parameter("unused", unused)
    options = Train(steps=3, schedule={"warmup_steps": 0}, optimizer={"lr": 0.1, "weight_decay": 0.5})
    for method in ("sum", "mgda"):
        update = build_update(CycleUpdate, options, net, method=method)
        for step, cycle in enumerate(make_cycles(3)):
            take_step(update, step, cycle)
        assert unused.grad is None and torch.equal(unused.detach(), torch.ones(3).double()), method


def test_the_gramian_described():
    gramian = torch.tensor([[4.0, -2.0], [-2.0, 9.0]], dtype=torch.float64)
    found = describe_gramian(["a", "b"], gramian, torch.tensor([1.0, 0.5], dtype=torch.float64))
    total = 4 - 2 + 9 / 4  # |a + b / 2|^2
    assert found == pytest.approx({
        "gradient/norm/a": 2.0, "gradient/norm/b": 3.0, "gradient/cosine/a,b": -1 / 3,
        "gradient/share/a": 3 / total, "gradient/share/b": (9 / 4 - 1) / total,
    })  # fmt: skip


# Whole runs


FAST = ("data.split=all", "train.steps=3")


@pytest.mark.parametrize("method", [*LOSS_METHODS, *INSTALLED])
def test_every_method_trains_in_bf16_with_missing_labels_and_resumes_to_the_bit(config, tmp_path, method):
    """Resumed are those with a state; that it comes back to the bit is tested above for each alone."""
    options = [*FAST, f"balancing.method={method}", "train.precision=bf16", "balancing.measure_every=2"]
    stateful = method in ("uncertainty", "famo", "gradvac")
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / ("whole" if stateful else "run"), *options) == 0
    if stateful:
        resume(config, tmp_path, options)
    log = read_log(tmp_path / "run")
    check_log(log, method)


def resume(config, tmp_path, options):
    with pytest.MonkeyPatch.context() as patch:
        with pytest.MonkeyPatch.context() as inner:
            stop_at_check(inner, 2)
            assert run_train(inner, config, tmp_path / "run", *options) == 75
        assert run_train(patch, config, tmp_path / "run", *options, "--resume") == 0
    assert are_same_weights(tmp_path / "run", tmp_path / "whole")
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")


def check_log(log, method):
    measured = [line for line in log if "gradient/norm/depth" in line]
    assert [line["step"] for line in measured] == ([1, 2, 3] if method in INSTALLED else [2])
    assert all(
        math.isfinite(value) for line in log for key, value in line.items() if key.startswith(("loss", "weight"))
    )


def test_a_method_whose_solver_is_missing_says_what_to_install(config, tmp_path, capsys):
    missing = [method for method in GRADIENT_METHODS if method not in INSTALLED]
    if not missing:
        pytest.skip("all solvers are installed")
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / "run", f"balancing.method={missing[0]}") == 2
    message = capsys.readouterr().err
    assert "needs packages that are not installed" in message and "torchjd[" in message
