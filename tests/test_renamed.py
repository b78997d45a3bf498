"""What older versions wrote: weights files load under the new names, old config keys and checkpoints are refused."""

import json
import re

import pytest
import safetensors.torch
import torch

import training.checkpoint
from experiment import build_network, build_tasks, load_trained
from tasks import TASKS
from training.checkpoint import load_newest_checkpoint, save_checkpoint, save_weights
from training.config import ConfigError, Model, config_to_dict, load_config
from training.renamed import OTHER_WORDS, RENAMED_FEATURES, RENAMED_KEYS, find_new_key, find_other_word, rename_all

SIZE = (96, 64)


def test_every_old_key_has_a_new_one_and_other_keys_have_none():
    for old, name in RENAMED_KEYS.items():
        key = old.replace("*", "some_task")
        assert find_new_key(key) == ".".join([*key.split(".")[:-1], name])
        assert find_new_key(find_new_key(key)) is None
        assert find_new_key(f"{key}.more") is None
    assert find_new_key("tasks.depth") is None and find_new_key("codec") is None


def list_keys(block, prefix=""):
    for name, value in block.items():
        yield f"{prefix}{name}"
        if isinstance(value, dict):
            yield from list_keys(value, f"{prefix}{name}.")


def test_answers_to_words_of_other_projects_name_keys_that_exist(tmp_path):
    (tmp_path / "c.yaml").write_text(f"tasks: {{{', '.join(f'{name}: ' for name in TASKS)}}}\n")
    config = load_config(tmp_path / "c.yaml", [], {name: task.Options for name, task in TASKS.items()})
    keys = set(list_keys(config_to_dict(config)))
    for word, answer in OTHER_WORDS.items():
        named = set(re.findall(r"\b[a-z_]+(?:\.[a-z_]+)+", answer))
        assert named <= keys and (named or "--run" in answer), word
        assert word not in keys, "a key of the config is no other project's word"


def test_a_word_with_a_dot_has_its_answer_below_that_block_alone():
    assert find_other_word("train.optimizer.name") == find_other_word("optimizer.name") == OTHER_WORDS["optimizer.name"]
    assert find_other_word("data.path") and find_other_word("model.encoder.path") is None
    assert find_other_word("name") is None and find_other_word("train.Batch-Size") == OTHER_WORDS["batch_size"]


def test_names_change_where_they_stand_for_what_was_renamed_and_nowhere_else():
    before = {
        "tasks": {
            "depth": {"cap": 80.0, "head": {"depth": 2, "reads": ["neck.4"]}},
            "detection": {"codec": "grid", "head": {"depth": 4, "reads": ["trunk.8", "encoder.32"]}},
        },
        "fitted": {"depth": {"constant": 9.0}},
        "cameras": {"Datasets/v1.5/tasks.x.codec": {"front_center": [[1.0, 0.0, 2.0]]}},
        "note": "trunk.8",
    }
    after = json.loads(json.dumps(before))
    after["tasks"]["depth"]["head"] = {"layers": 2, "reads": ["neck.4"]}
    after["tasks"]["detection"] = {"box_coder": "grid", "head": {"layers": 4, "reads": ["backbone.8", "encoder.32"]}}
    assert rename_all(before) == after
    assert rename_all(after) == after


def write_old(content, key=""):
    """The header as it was before: the tables applied in the other direction."""
    if isinstance(content, dict):
        old = {}
        for name, value in content.items():
            candidates = [pattern.rsplit(".", 1)[1] for pattern in RENAMED_KEYS]
            full = f"{key}.{name}".lstrip(".")
            before = [each for each in candidates if find_new_key(f"{key}.{each}") == full]
            old[before[0] if before else name] = write_old(value, full)
        return old
    if isinstance(content, list):
        return [write_old(value, key) for value in content]
    if isinstance(content, str) and key.endswith(".reads"):
        for before, after in RENAMED_FEATURES.items():
            content = content.replace(f"{after}.", f"{before}.")
    return content


NETWORKS = {
    "yolo": {"detection": {"head": {"reads": ["backbone.8", "backbone.16", "backbone.32"], "layers": 1, "width": 32}}},
    "thesis": {"detection": {"box_coder": "grid"}},
    "multitask": {"depth": {"head": {"layers": 1}}, "segmentation": {"head": {"layers": 2, "width": 32}}},
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_weights_file_of_before_gives_the_outputs_of_today(kind, tmp_path):
    model = Model(kind=kind, encoder={"name": "resnet18", "pretrained": False} if kind != "yolo" else {})
    tasks = build_tasks({name: TASKS[name].Options(**given) for name, given in NETWORKS[kind].items()})
    torch.manual_seed(0)
    net = build_network(model, tasks, SIZE, load_pretrained=False).eval()
    header = {
        "model": model.model_dump(mode="json"),
        "tasks": {name: task.options.model_dump(mode="json") for name, task in tasks.items()},
        "fitted": {name: {} for name in tasks},
        "input_size": list(SIZE),
        "split": {"name": "all", "seed": 0, "fractions": [1, 0, 0], "views": ["front_center"], "roots": ["x"]},
    }
    save_weights(tmp_path / "new.safetensors", net.state_dict(), header)
    old = {"format": 1, **write_old(header)}
    text = json.dumps(old)
    assert ('"codec"' in text) == ("detection" in tasks) and '"layers"' not in text and "backbone." not in text
    tensors = {name: tensor.contiguous().clone() for name, tensor in net.state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / "old.safetensors", metadata={"header": text})

    new, loaded = (load_trained(tmp_path / f"{name}.safetensors", torch.device("cpu")) for name in ("new", "old"))
    assert {name: task.options for name, task in loaded.tasks.items()} == {n: t.options for n, t in new.tasks.items()}
    image = torch.rand(1, 3, SIZE[1], SIZE[0])
    with torch.no_grad():
        ours, theirs = new.net(image), loaded.net(image)
    for name in tasks:
        for a, b in zip(flatten(ours[name]), flatten(theirs[name]), strict=True):
            assert torch.equal(a, b)


def flatten(output):
    return [output] if isinstance(output, torch.Tensor) else [each for each in output if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("tasks.depth.head.depth=2", "tasks.depth.head.layers"),
        ("tasks.segmentation.head.depth=2", "tasks.segmentation.head.layers"),
        ("tasks.detection.codec=grid", "tasks.detection.box_coder"),
    ],
)
def test_an_old_config_key_is_an_error_that_names_the_new_one(old, new, tmp_path):
    (tmp_path / "c.yaml").write_text("tasks: {depth: {}}\n")
    with pytest.raises(ConfigError, match=f"{old.partition('=')[0]} = .*: this key is called {new} now"):
        load_config(tmp_path / "c.yaml", [old], {name: task.Options for name, task in TASKS.items()})


def test_a_checkpoint_of_before_is_refused_in_one_line(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.checkpoint, "CHECKPOINT_FORMAT", 1)
        save_checkpoint(tmp_path, 3, {"net": {"weight": torch.zeros(2)}, "averaged": None}, keep=1)
    with pytest.raises(ValueError, match=r"has format 1 .*finish that run with the version that began it") as caught:
        load_newest_checkpoint(tmp_path)
    assert "\n" not in str(caught.value)
