"""A run that is stopped anywhere and resumed is the run that was never stopped: weights, scores and log."""

import json

import pytest
import torch
from tiny_run import CONFIG, are_same_weights, read_log, run_train, stop_at_check

import train
from tasks import TASKS
from tasks.depth import Depth
from training.checkpoint import load_weights
from training.config import load_config


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, folder) == 0
    return folder


# before step 2, in the evaluation after it, before step 3, in the last evaluation
@pytest.mark.parametrize("number", [2, 3, 4, 6])
def test_a_run_stopped_anywhere_goes_on_as_if_it_had_not_been(config, whole, tmp_path, number):
    with pytest.MonkeyPatch.context() as patch:
        stop_at_check(patch, number)
        assert run_train(patch, config, tmp_path / "run", "--resume") == 75
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / "run", "--resume") == 0
    assert are_same_weights(tmp_path / "run", whole)
    assert read_log(tmp_path / "run") == read_log(whole)
    ours, theirs = (json.loads((folder / "best.json").read_text()) for folder in (tmp_path / "run", whole))
    assert ours == theirs


def test_a_run_that_ended_without_a_signal_goes_on_from_its_checkpoint(config, tmp_path):
    """A crash in step 4, after the checkpoint of step 3 and with a line logged since."""

    def crash(*arguments, **options):
        raise OSError("the disk is full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "evaluate", crash)
        assert run_train(patch, config, tmp_path / "run", "train.evaluate_every=4") == 1
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 3, 4]
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / "run", "--resume", "train.evaluate_every=4") == 0
        assert run_train(patch, config, tmp_path / "other", "train.evaluate_every=4") == 0
    assert are_same_weights(tmp_path / "run", tmp_path / "other")
    assert read_log(tmp_path / "run") == read_log(tmp_path / "other")


def test_another_seed_is_another_run(config, whole, tmp_path):
    """Without this the tests above could pass on weights that nothing changes."""
    with pytest.MonkeyPatch.context() as patch:
        assert run_train(patch, config, tmp_path / "run", "seed=1") == 0
    ours, theirs = (load_weights(folder / "best.safetensors")[0] for folder in (tmp_path / "run", whole))
    assert not all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_loss_that_is_not_finite_stops_before_the_update_and_names_step_and_frames(config, tmp_path, capsys):
    loss, calls = Depth.loss, []

    def spoil(self, output, target):
        calls.append(1)
        return loss(self, output, target) * (float("nan") if len(calls) == 2 else 1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Depth, "loss", spoil)
        assert run_train(patch, config, tmp_path / "run", "data.labels=symmetric") == 1
    message = capsys.readouterr().err
    assert "step 2: the loss of depth is not finite" in message and "/front_center/" in message


@pytest.mark.parametrize("update", ["cycle", "async"])
def test_layers_that_draw_make_a_resume_no_less_exact(config, tmp_path, update):
    """Dropout on all features, as DropPath in a Swin encoder: what it draws is a function of seed, step and number."""
    build = train.build_network
    groups = {name: {"lr": 1e-3, "samples": 2} for name in ("encoder", *CONFIG["tasks"])}
    options = [f"train.groups={json.dumps(groups)}", "train.update=async"] if update == "async" else []
    defaults = ["train.schedule={}"] if update == "async" else []

    def build_with_dropout(*arguments):
        net = build(*arguments)
        net.encoder.backbone.register_forward_hook(
            lambda module, _, maps: [torch.nn.functional.dropout(each, 0.3, module.training) for each in maps]
        )
        return net

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_network", build_with_dropout)
        assert run_train(patch, config, tmp_path / "whole", *options, *defaults) == 0
        with pytest.MonkeyPatch.context() as inner:
            stop_at_check(inner, 3)
            assert run_train(inner, config, tmp_path / "run", *options, *defaults) == 75
        torch.rand(7)  # whatever is drawn in between
        assert run_train(patch, config, tmp_path / "run", *options, *defaults, "--resume") == 0
    assert are_same_weights(tmp_path / "run", tmp_path / "whole")
    assert read_log(tmp_path / "run") == read_log(tmp_path / "whole")


def test_determinism_is_free_on_the_cpu_and_asked_for_on_a_gpu(config):
    options = {name: task.Options for name, task in TASKS.items()}
    cases = {
        ("auto", "cpu"): "warn",
        ("auto", "cuda"): None,
        ("warn", "cuda"): "warn",
        ("true", "cuda"): "refuse",
        ("false", "cpu"): None,
    }
    for (value, device), expected in cases.items():
        chosen = load_config(config, [f"deterministic={value}"], options)
        train.set_determinism(chosen, torch.device(device))
        found = "warn" if torch.is_deterministic_algorithms_warn_only_enabled() else "refuse"
        assert (found if torch.are_deterministic_algorithms_enabled() else None) == expected, (value, device)
