"""Every kind of network through the config: what fits what, all shipped configs trained, weights files, the table."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from derived_root import WITHOUT_BOXES, write_root

import evaluate
import train
import visualize
from a2d2.images import read_image, write_json
from experiment import KINDS, WrongUseError, build_network, build_tasks, load_trained
from models.yolo import YoloBackbone
from tasks import TASKS
from training.config import Model, load_config

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if "study" not in path.parts]
OPTIONS = {name: task.Options for name, task in TASKS.items()}
TASK_OF = {"unet": "segmentation", "densedepth": "depth", "yolo": "detection", "pilotnet": "steering"}
YOLO_READS = ["backbone.8", "backbone.16", "backbone.32"]


@pytest.fixture(scope="module")
def derived(tmp_path_factory):
    root = tmp_path_factory.mktemp("derived")
    frames = write_root(root)
    # detection waits for the first object, and a regime may leave it this frame alone
    (empty,) = (frame for frame in frames if (frame.scene, frame.id) == WITHOUT_BOXES)
    write_json(empty.path("boxes"), {"boxes": [{"box": [8.0, 20.0, 40.0, 44.0], "class": "Car", "visible": 1.0}]})
    return root


def make_tasks(**given):
    """Tasks of these names and options, with label statistics, which come from no labels."""
    tasks = build_tasks({name: OPTIONS[name](**options) for name, options in given.items()})
    for task in tasks.values():
        task.collect_statistics([])
    return tasks


def shrink(path, derived, *overrides):
    """A shipped config at 64x64 on the six frames, for a step; the network itself stays as it is."""
    kind = load_config(path, [], OPTIONS).model.kind
    untrained = ["model.encoder.pretrained=false"] if KINDS[kind].encoder else []
    tiny = [
        f"data.roots=[{derived}]",
        "data.split=all",
        "data.limit=null",
        "data.workers=0",
        "model.input_size=[64,64]",
        "train.steps=1",
        "train.micro_batch=1",
        "train.cycle=1",
        "log.tensorboard=false",
    ]
    return load_config(path, [*tiny, *untrained, *overrides], OPTIONS)


def run_main(program, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, arguments)])
    return program.main()


# What fits what


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_are_those_of_the_config(kind):
    assert Model(kind=kind).kind == kind


def test_no_kind_is_missing():
    assert set(KINDS) == set(Model.model_fields["kind"].annotation.__args__)


@pytest.mark.parametrize("kind", TASK_OF)
def test_a_specialist_refuses_every_other_task(kind):
    for name in TASKS:
        if name != TASK_OF[kind]:
            with pytest.raises(
                WrongUseError, match=rf"model\.kind={kind} has the output format .* tasks\.{name} asks for"
            ) as caught:
                build_network(Model(kind=kind), make_tasks(**{name: {}}), (64, 64))
            # the way out that it names is one
            (task,) = make_tasks(**{name: {}}).values()
            for other, its in KINDS.items():
                fits = its.output_formats is None or task.output_format in its.output_formats
                assert (f" {other} " in str(caught.value).replace("=", " ").replace(",", " ")) == (
                    fits or other == kind
                )


@pytest.mark.parametrize("kind", TASK_OF)
def test_a_specialist_takes_one_task(kind):
    with pytest.raises(WrongUseError, match=rf"model\.kind={kind} is for one task, not for segmentation, depth"):
        build_network(Model(kind=kind), make_tasks(segmentation={}, depth={}), (64, 64))


@pytest.mark.parametrize(
    ("kind", "block", "ignored"),
    [
        ("unet", {"neck": {"width": 64}}, "model.neck.width=64"),
        ("unet", {"encoder": {"pretrained": False}}, "model.encoder.pretrained=False"),
        ("pilotnet", {"encoder": {"name": "resnet18"}}, "model.encoder.name=resnet18"),
        ("densedepth", {"neck": {"repeats": 3}}, "model.neck.repeats=3"),
        ("thesis", {"neck": {"repeats": 3}}, "model.neck.repeats=3"),
    ],
)
def test_options_of_the_model_that_would_do_nothing_are_refused(kind, block, ignored):
    tasks = make_tasks(**{TASK_OF.get(kind, "depth"): {}})
    with pytest.raises(WrongUseError, match=f"model.kind={kind} has no use for {ignored}:"):
        build_network(Model(kind=kind, **block), tasks, (64, 64))


@pytest.mark.parametrize(
    ("kind", "name", "options"),
    [
        ("unet", "segmentation", {"width": 64}),
        ("densedepth", "depth", {"stop_gradient": True}),
        ("pilotnet", "steering", {"hidden": 16}),
        ("thesis", "depth", {"bins": 8}),
    ],
)
def test_options_of_a_head_that_would_do_nothing_are_refused(kind, name, options):
    (key, value), tasks = next(iter(options.items())), make_tasks(**{name: {"head": options}})
    with pytest.raises(WrongUseError, match=rf"has no use for tasks\.{name}\.head\.{key}={value}:"):
        build_network(Model(kind=kind), tasks, (64, 64))


def test_a_head_that_reads_what_is_not_there_is_wrong_use():
    with pytest.raises(
        WrongUseError, match=r"tasks\.detection\.head: .*neck\.8.* offers backbone\.8, backbone\.16, backbone\.32"
    ):
        build_network(Model(kind="yolo"), make_tasks(detection={}), (64, 64))
    with pytest.raises(WrongUseError, match=r"tasks\.depth\.head: .*neck\.2"):
        encoder = {"name": "resnet18", "pretrained": False}
        build_network(Model(encoder=encoder), make_tasks(depth={"head": {"reads": ["neck.2"]}}), (64, 64))


def test_the_detector_predicts_on_the_strides_that_its_options_name():
    """The task counts positives on these, before there is an output."""
    for reads in (YOLO_READS, YOLO_READS[1:]):
        (task,) = make_tasks(detection={"head": {"reads": reads}}).values()
        net = build_network(Model(kind="yolo"), {"detection": task}, (75, 131)).eval()
        with torch.no_grad():
            output = net(torch.rand(1, 3, 131, 75))["detection"]
        strides = tuple(int(name.split(".")[1]) for name in reads)
        cells = [-(-131 // stride) * -(-75 // stride) for stride in strides]
        assert output.strides == strides and output.classes.shape[1] == sum(cells)


def test_trunk_features_have_the_channels_that_they_say():
    backbone = YoloBackbone(8, 1)
    features = backbone(torch.rand(1, 3, 64, 96))
    assert {name: feature.shape[1] for name, feature in features.items()} == backbone.channels


ENCODERS = ["resnet34", "resnet50", "convnext_tiny", "mobilenetv4_conv_medium", "swin_tiny_patch4_window7_224"]


@pytest.mark.parametrize("name", [*ENCODERS, "swinv2_tiny_window8_256", "densenet121"])
def test_encoders_by_name_serve_all_tasks_at_an_odd_size(name):
    tasks = make_tasks(**{task: {} for task in TASKS})
    net = build_network(Model(encoder={"name": name, "pretrained": False}), tasks, (107, 69)).eval()
    with torch.no_grad():
        outputs = net(torch.rand(1, 3, 69, 107))
    assert list(outputs) == list(tasks)
    for task, output in zip(tasks.values(), outputs.values(), strict=True):
        assert task.predict(output, (107, 69)) is not None
    assert outputs["segmentation"].shape[2:] == outputs["depth"].shape[1:] == (69, 107)
    assert outputs["depth"].isfinite().all()


# Training and weights files


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs").with_suffix("")))
def test_every_shipped_config_trains(path, derived, tmp_path, monkeypatch):
    monkeypatch.setattr("training.run.save_checkpoint", lambda *_: None)  # half a gigabyte each, and tested elsewhere
    config = shrink(path, derived)
    folder = tmp_path / "run"
    train.train(config, folder, resume=False)
    (line,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    losses = {key.removeprefix("loss/"): value for key, value in line.items() if key.startswith("loss/")}
    assert losses.keys() == config.tasks.keys()
    assert all(0 <= loss < float("inf") for loss in losses.values())
    trained = load_trained(folder, torch.device("cpu"))
    outputs = trained.net(torch.rand(1, 3, 64, 64))
    for name, task in trained.tasks.items():
        task.predict(outputs[name], (64, 64))
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def runs(derived, tmp_path_factory):
    """Weights files of two specialists and a small shared network, each with another input size."""
    folder = tmp_path_factory.mktemp("runs")
    given = {
        "unet": ("specialist/unet.yaml", []),
        "pilotnet": ("specialist/pilotnet.yaml", ["model.input_size=[160,100]", "train.steps=3"]),
        "shared": ("debug.yaml", ["model.input_size=[96,48]"]),
    }
    for name, (config, overrides) in given.items():
        train.train(shrink(ROOT / "configs" / config, derived, *overrides), folder / name, resume=False)
        (folder / name / "config.yaml").unlink()
    return [folder / name for name in given]


def test_a_specialist_is_rebuilt_from_its_weights_file_alone(runs, tmp_path):
    copy = tmp_path / "alone.safetensors"
    shutil.copy(runs[1] / "best.safetensors", copy)
    first, second = (load_trained(path, torch.device("cpu")) for path in (runs[1], copy))
    assert second.name == "alone" and second.size == (160, 100)
    image = torch.rand(2, 3, 100, 160)
    with torch.no_grad():
        predictions = [
            each.tasks["steering"].predict(each.net(image)["steering"], (64, 64)) for each in (first, second)
        ]
    assert torch.equal(*predictions)
    assert predictions[0][0] != predictions[0][1]


def test_runs_of_other_kinds_and_sizes_are_scored_and_drawn_side_by_side(runs, tmp_path, monkeypatch, capsys):
    table = tmp_path / "table.json"
    assert run_main(evaluate, monkeypatch, *runs, "--split", "train", "--workers", "0", "--output", table) == 0
    scores = json.loads(table.read_text())["runs"]
    assert {run: set(found) for run, found in scores.items()} == {
        "unet": {"segmentation"},
        "pilotnet": {"steering"},
        "shared": set(TASKS),
    }
    # the same frames, and the same constant to hold against, whatever the network sees of them
    for run, name in (("unet", "segmentation"), ("pilotnet", "steering")):
        for key in ("frames", "constant"):
            assert scores[run][name][key] == scores["shared"][name][key]
        assert scores[run][name]["score"] is not None
    output = tmp_path / "panels"
    assert run_main(visualize, monkeypatch, *runs, "--split", "train", "--count", "1", "--output", output) == 0
    (path,) = output.glob("*.png")
    # ground truth and three runs side by side, each at least 2.2 inches wide
    assert read_image(path).shape[1] >= 4 * 2.2 * 200


def test_wrong_use_and_missing_weights_are_one_line(derived, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    common = ["--run", tmp_path / "run", f"data.roots=[{derived}]", "data.split=all"]
    for config, override, code, words in [
        ("symmetric.yaml", "seed=0", 1, "model.encoder.weights=FILE"),
        ("symmetric.yaml", "model.kind=unet", 2, "is for one task"),
        ("single_task/depth.yaml", "model.kind=unet", 2, "tasks.depth asks for log_depth"),
        ("specialist/unet.yaml", "model.neck.width=64", 2, "no use for model.neck.width=64"),
    ]:
        arguments = ["--config", ROOT / "configs" / config, *common, override]
        assert run_main(train, monkeypatch, *arguments) == code
        lines = [
            line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "fit constants" not in line
        ]
        (line,) = [line.strip().removeprefix("\x1b[A") for line in lines if line.strip()]  # a slow bar moves the cursor
        assert line.startswith("train: ") and words in line
    assert not (tmp_path / "run").exists()


# The table


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("table")
    config = folder / "tiny.yaml"
    config.write_text(
        "data: {roots: [nowhere/96x64]}\n"
        "model: {encoder: {name: resnet18, norm: group}, neck: {width: 32, repeats: 1}}\n"
        "tasks: {segmentation: {head: {width: 32, layers: 1}}, steering: {}}\n"
        "train: {micro_batch: 2, ema: null}\n"
    )
    paths = [config, ROOT / "configs/specialist/pilotnet.yaml"]
    command = [sys.executable, ROOT / "benchmarks/networks.py", "--config", *paths, "--output", folder / "out"]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=folder)
    assert result.returncode == 0, result.stderr
    return config, result.stdout, folder / "out"


def test_the_table_is_printed_and_saved(table):
    config, printed, output = table
    saved = output.with_suffix(".md").read_text()
    assert printed.startswith(saved) and str(output.with_suffix(".json")) in printed
    assert "| specialist/pilotnet | pilotnet | 1024x640 | 0.25 |" in saved
    assert f"| {config} | segmentation |" in saved


def test_the_table_counts_what_there_is(table):
    config, _, output = table
    tiny, pilotnet = json.loads(output.with_suffix(".json").read_text())
    assert (tiny["size"], tiny["micro_batch"], tiny["precision"]) == ([96, 64], 2, "bf16")
    parts = tiny["parts"]
    assert list(parts) == ["encoder", "neck", "segmentation", "steering"] and "backbone" in pilotnet["parts"]

    loaded = load_config(config, [], OPTIONS)
    tasks = make_tasks(segmentation={"head": {"width": 32, "layers": 1}}, steering={})
    net = build_network(loaded.model, tasks, (96, 64), load_pretrained=False)
    assert sum(part["parameters"] for part in parts.values()) == sum(p.numel() for p in net.parameters())
    # by hand: two 3x3 convolutions 32 -> 32 on 24x16 cells, then a 1x1 to 19 classes
    assert parts["segmentation"]["macs"] == 24 * 16 * 32 * (2 * 9 * 32 + 19)
    # PilotNet by hand, from the sizes in its paper
    layers = [(31 * 98, 75 * 24), (14 * 47, 600 * 36), (5 * 22, 900 * 48), (3 * 20, 432 * 64), (1 * 18, 576 * 64)]
    assert pilotnet["parts"]["backbone"]["macs"] == sum(cells * weights for cells, weights in layers)
    dense = 1152 * 100 + 100 * 50 + 50 * 10 + 10
    assert pilotnet["parts"]["steering"]["macs"] == dense
    # bfloat16 copies of the weights, but for those of the last layer
    assert pilotnet["parts"]["steering"]["fixed"] == 2 * (dense - 10)
    weights = sum(part["parameters"] for part in parts.values()) * 4 * 4
    fixed = sum(part["fixed"] for part in parts.values())
    image = 96 * 64 * 3 * 5 + parts["encoder"]["saved"] + parts["neck"]["saved"] + parts["segmentation"]["saved"]
    assert tiny["training"] == weights + fixed + 2 * image


def test_what_a_head_and_its_loss_save(table):
    """A map head by hand: under a GPU's autocast all but the last layer and the loss save two bytes a number."""
    cells, pixels, classes = 24 * 16, 96 * 64, 19
    saved = json.loads(table[2].with_suffix(".json").read_text())[0]["parts"]["segmentation"]["saved"]
    # two norms, two activations and the second convolution; the first reads a feature, which is the neck's
    layers, last_layer = 5 * 2 * 32 * cells, 4 * 32 * cells
    statistics = 2 * 2 * 8  # mean and spread of eight groups
    logits = 4 * classes * pixels
    loss = 4 * classes * pixels + 8 * pixels + 4 * classes + 4  # probabilities, label, weights, their sum
    assert saved == layers + 2 * statistics + last_layer + logits + loss


def test_the_size_of_a_network_must_be_known(tmp_path):
    path = tmp_path / "nameless.yaml"
    path.write_text("data: {roots: [somewhere]}\ntasks: {depth: {}}\n")
    command = [sys.executable, ROOT / "benchmarks/networks.py", "--config", path, "--output", tmp_path / "out"]
    result = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert result.returncode == 2 and "give model.input_size" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out.md").exists()
