"""Parts of a network in training: frozen, compiled, computed twice; tasks that start late; labels by budget; and scores
that come together from several ranks."""

import copy
import json

import pytest
import torch
from small_net import build_net
from tiny_run import read_log, run_train
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.data import default_collate

import evaluate
import train
from a2d2.dataset import Geometry
from experiment import build_network, build_tasks, load_data, read_split
from tasks import TASKS
from tasks.options import OPTIONS
from training.checkpoint import load_weights
from training.config import Model, load_config
from training.parts import compile_parts, freeze_parts, recompute_neck, start_training

SMALL = {"encoder": {"name": "test_resnet", "pretrained": False, "norm": "group"}, "neck": {"width": 32, "repeats": 2}}
FAST = ("data.split=all",)


def build_small():
    torch.manual_seed(0)
    tasks = build_tasks({name: OPTIONS[name]() for name in ("depth", "steering")})
    return build_network(Model(**SMALL), tasks, (96, 64), load_pretrained=False)


def run_once(net, image):
    net.zero_grad(set_to_none=True)
    outputs = net(image)
    sum(output.square().mean() for output in outputs.values()).backward()
    return outputs, {name: parameter.grad for name, parameter in net.named_parameters()}


def measure_saved(net, image):
    sizes = []

    def keep(tensor):
        sizes.append(tensor.nbytes)
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        net(image)
    return sum(sizes)


def test_a_neck_that_computes_twice_has_the_same_gradient_and_keeps_less():
    net, image = build_small().train(), torch.rand(2, 3, 64, 96)
    again = copy.deepcopy(net)
    recompute_neck(again)
    (outputs, gradients), (others, same) = run_once(net, image), run_once(again, image)
    assert all(torch.equal(outputs[name], others[name]) for name in outputs)
    assert all(torch.equal(gradient, same[name]) for name, gradient in gradients.items() if gradient is not None)
    assert any("neck" in name and gradient.any() for name, gradient in same.items() if gradient is not None)
    saved = [measure_saved(each, image) for each in (net, again)]
    assert saved[1] < 0.9 * saved[0], saved


def test_compiled_parts_are_the_same_network_under_the_same_names():
    net, image = build_net(("a", "b")).train(), torch.rand(2, 3, 8, 8).double()
    compiled = copy.deepcopy(net)
    compile_parts(compiled, backend="aot_eager")
    assert list(compiled.state_dict()) == list(net.state_dict())
    (outputs, gradients), (others, same) = run_once(net, image), run_once(compiled, image)
    for name, output in outputs.items():
        torch.testing.assert_close(others[name], output, rtol=1e-4, atol=1e-5)
    for name, gradient in gradients.items():
        assert (gradient is None) == (same[name] is None)
        if gradient is not None:
            torch.testing.assert_close(same[name], gradient, rtol=1e-3, atol=1e-5)


def test_frozen_parts_have_no_gradient_and_draw_nothing():
    net = build_small()
    freeze_parts(net, ["encoder", "heads.depth"])
    start_training(net, ["encoder", "heads.depth"])
    assert net.neck.training and net.heads["steering"].training
    assert not any(module.training for part in (net.encoder, net.heads["depth"]) for module in part.modules())
    _, gradients = run_once(net, torch.rand(2, 3, 64, 96))
    for name, gradient in gradients.items():
        if name.startswith(("encoder.", "heads.depth.")):
            assert gradient is None, name
        elif name.startswith("heads.steering."):
            assert gradient is not None, name
    with pytest.raises(ValueError, match=r"names heads\.boxes, and this kind of network has none"):
        freeze_parts(net, ["heads.boxes"])


def test_frozen_parts_and_tasks_out_of_season_are_as_they_were(config, tmp_path):
    """Weights, means of the optimizer, and the EMA, which starts from them."""
    options = [*FAST, "train.steps=6", "train.freeze=[encoder]", "train.save_every=1", "train.keep_checkpoints=9"]
    options += ["tasks.depth.train={from_step: 4}", "tasks.steering.train={until_step: 2}"]
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / "run", *options) == 0
    states = {}
    for step in range(1, 7):
        path = tmp_path / "run/checkpoints" / f"step_{step:08d}.pt"
        states[step] = torch.load(path, weights_only=True)["state"]

    def changed(part, first, last):
        one, other = states[first]["net"], states[last]["net"]
        return any(not torch.equal(one[name], other[name]) for name in one if name.startswith(part))

    assert not changed("encoder.", 1, 6) and changed("neck.", 1, 6)
    assert not changed("heads.depth.", 1, 4) and changed("heads.depth.", 4, 6)
    assert changed("heads.steering.", 1, 2) and not changed("heads.steering.", 2, 6)
    log = [line for line in read_log(tmp_path / "run") if line["kind"] == "train"]
    assert [["loss/depth" in line, "loss/steering" in line] for line in log] == [[False, True]] * 2 + [
        [False, False]
    ] * 2 + [[True, False]] * 2
    averaged, first = states[6]["ema"], states[1]["net"]
    assert all(torch.equal(averaged[name], first[name]) for name in first if name.startswith("encoder."))


def test_steps_without_any_task_are_refused(config, tmp_path, capsys):
    late = [f"tasks.{name}.train={{from_step: 2}}" for name in TASKS]
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / "run", *FAST, *late) == 2
    assert "steps in which no task is trained" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_budget_is_what_trains_and_what_statistics_see(config, tmp_path):
    """And its seed is its own: another seed of the run leaves the labels alone."""
    options = [*FAST, "train.steps=2", "data.labels={budget: {steering: 0.34, segmentation: 0.5}}"]
    with pytest.MonkeyPatch.context() as patch:
        for name, more in (("one", []), ("seed", ["seed=3"]), ("labels", ["data.labels_seed=3"])):
            assert run_train(patch, config, tmp_path / name, *options, *more) == 0
    texts = {name: (tmp_path / name / "assignment.json").read_text() for name in ("one", "seed", "labels")}
    assert texts["one"] == texts["seed"] != texts["labels"]
    labels = json.loads(texts["one"])["labels"]
    counts = {name: sum(map(len, groups.values())) for name, groups in labels.items()}
    assert counts == {"segmentation": 2, "depth": 4, "detection": 4, "steering": 1}
    header = load_weights(tmp_path / "one/best.safetensors")[1]
    ((folder, (identity,)),) = labels["steering"].items()
    scene = folder.split("/")[0]
    number = int(identity) - 1
    assert header["fitted"]["steering"]["constant"] == 10.0 * number - 15, scene


def test_frames_bring_only_the_labels_that_are_assigned(config):
    """Under a budget a frame that has a label and no right to use it is a frame without it, whatever draws it."""
    chosen = load_config(config, [*FAST, "data.labels={budget: {segmentation: 0.25}}", "train.steps=20"], OPTIONS)
    setup = train.prepare(chosen)
    allowed = {name: {str(setup.frames[index]) for index in indices} for name, indices in setup.assignment.items()}
    assert len(allowed["segmentation"]) == 1 < len(allowed["depth"])
    seen = {name: set() for name in TASKS}
    for cycle in train.load_cycles(setup, 0):
        for batch in cycle:
            for name, rows in batch["rows"].items():
                seen[name] |= {batch["frame"][row] for row in rows.tolist()}
    assert seen == allowed


@pytest.mark.parametrize("name", TASKS)
def test_metrics_that_come_together_are_those_of_all(name):
    """Predictions of ten frames, scored in one collection and in three, one of them without any."""
    task = TASKS[name]()
    task.collect_statistics([])
    rng = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(10):
        if name == "segmentation":
            pair = [torch.randint(0, 19, (1, 8, 8), generator=rng).to(torch.uint8) for _ in range(2)]
        elif name == "depth":
            pair = [1 + 60 * torch.rand(1, 8, 8, generator=rng) for _ in range(2)]
        elif name == "steering":
            pair = [30 * torch.randn(1, 1, generator=rng) for _ in range(2)]
        else:
            corner = 60 * torch.rand(3, 2, generator=rng)
            boxes = torch.cat([corner, corner + 20], dim=1)
            label = [{"box": box, "class": "Car", "visible": 1.0} for box in (boxes + 2).tolist()]
            target = default_collate([task.transform(label, Geometry.identity((128, 96)))])
            scores = torch.rand(3, generator=rng)
            pair = [[{"boxes": boxes, "scores": scores, "labels": torch.zeros(3, dtype=torch.int64)}], target]
        batches.append(pair)
    whole, parts = task.metrics(), [task.metrics() for _ in range(3)]
    for number, (prediction, target) in enumerate(batches):
        whole.update(prediction, target)
        parts[0 if number < 4 else 2].update(prediction, target)
    first, *others = parts
    for other in others:
        first.merge(other)
    assert first.compute() == whole.compute() and any(whole.compute().values())
    empty = task.metrics()
    empty.merge(whole)
    assert empty.compute() == whole.compute()


def test_scores_in_bf16_say_so_and_are_near(config, tmp_path, capsys):
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / "run", *FAST, "train.steps=2") == 0
        found = {}
        for precision in ("fp32", "bf16"):
            arguments = [str(tmp_path / "run"), "--split", "train", "--workers", "0", "--precision", precision]
            patch.setattr("sys.argv", ["evaluate.py", *arguments, "--output", str(tmp_path / f"{precision}.json")])
            capsys.readouterr()
            assert evaluate.main() == 0
            assert f"precision {precision}" in capsys.readouterr().out
            found[precision] = json.loads((tmp_path / f"{precision}.json").read_text())["runs"]["run"]
    for name in ("depth", "steering"):
        one, other = (found[precision][name]["score"] for precision in ("fp32", "bf16"))
        assert one != other and other == pytest.approx(one, rel=0.05)
        assert found["bf16"][name]["precision"] == "bf16"


def test_rare_frames_are_drawn_more_often_and_the_record_keeps_how_often(config, tmp_path):
    options = [*FAST, "train.steps=2", "tasks.steering.oversample_below=0.9", "data.labels=one_at_a_time"]
    chosen = load_config(config, options, OPTIONS)
    setup = train.prepare(chosen)
    assert set(setup.record.repeat_factors) == {"steering"}
    # -15 and 5 degrees are in one range, 25 in another
    wanted = [(0.9 / share) ** 0.5 for share in (2 / 3, 2 / 3, 1 / 3)]
    assert setup.record.repeat_factors["steering"] == pytest.approx(wanted, rel=1e-5)
    data = load_data(read_split(chosen.data))
    again = train.prepare(chosen, setup.record, setup.write_assignment())
    assert again.build_streams() == setup.build_streams() and len(data.subsets["train"]) == len(setup.frames)
    with pytest.MonkeyPatch.context() as patch:
        arguments = [*FAST, "tasks.steering.oversample_below=0.9", "data.labels=symmetric"]
        assert run_train(patch, config, tmp_path / "run", *arguments) == 2
