"""The config: what it accepts, what it refuses and how it says so, and that a saved one is the same config again."""

import re

import pytest
import yaml
from pydantic import BaseModel, ConfigDict, Field

from training.config import ConfigError, _parse_yaml, config_to_dict, load_config, save_config


class Height(BaseModel):
    model_config = ConfigDict(extra="forbid")

    width: int = Field(64, gt=0)
    levels: tuple[str, ...] = ("neck.4",)


class Colour(BaseModel):
    model_config = ConfigDict(extra="forbid")

    classes: int = 19


TASKS = {"height": Height, "colour": Colour}


@pytest.fixture
def load(tmp_path):
    def load_text(text, *overrides):
        path = tmp_path / "trial.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, list(overrides), TASKS)

    return load_text


@pytest.fixture
def problems(load, tmp_path):
    def list_problems(text, *overrides):
        with pytest.raises(ConfigError) as caught:
            load(text, *overrides)
        assert all(line.startswith(str(tmp_path / "trial.yaml")) for line in caught.value.problems)
        assert str(caught.value).splitlines() == caught.value.problems
        return [line.removeprefix(f"{tmp_path / 'trial.yaml'}: ") for line in caught.value.problems]

    return list_problems


def test_defaults_fill_what_the_file_leaves_out(load):
    config = load("tasks: {height: {width: 8}}\ntrain:\n  # steps: 10\n")
    assert config.tasks == {"height": Height(width=8)}
    assert config.run == "trial"
    assert config.train.steps == 60000
    assert config.train.optimizer.betas == (0.9, 0.999)


def test_tasks_keep_their_order_whatever_the_order_of_the_file(load):
    assert list(load("tasks: {colour: {}, height: {}}").tasks) == ["height", "colour"]


@pytest.mark.parametrize("text", ["tasks:\n  height:\n", "tasks: {height: {}}"])
def test_named_task_without_options_takes_its_defaults(load, text):
    assert load(text).tasks == {"height": Height()}


def test_every_problem_is_reported_at_once(problems):
    found = problems(
        "seed: true\nmodle: {}\ntrain: {step: 3, micro_batch: 0}\ndata: {labels: some}\n"
        "tasks: {height: {wdth: 3, width: -1}, color: {}}\n",
        "data.workers=-1",
        "train.steps",
    )
    assert found == [
        "override 'train.steps' must have the form key=value, as in train.steps=100",
        "seed = true: must be a valid integer",
        'data.labels = "some": must be as_is, symmetric, one_task, one_at_a_time, '
        "{symmetric or one_task: [task, ...]}, {budget: {task: share, ...}} or {file: assignment.json}",
        "data.workers = -1: must be greater than or equal to 0 (from the command line)",
        "tasks.height.width = -1: must be greater than 0",
        "tasks.height.wdth = 3: unknown key; did you mean 'width'?",
        "tasks.color = {}: unknown key; did you mean 'colour'?",
        "train.micro_batch = 0: must be a whole number above 0, or such a number for each of some tasks: "
        "{task: number, ...}",
        "train.step = 3: unknown key; did you mean 'steps'?",
        "modle = {}: unknown key; did you mean 'model'?",
    ]


@pytest.mark.parametrize(
    ("text", "suggestion"),
    [
        ("lr: 0.1", "did you mean 'train.optimizer.lr'?"),
        ("train: {encoder: {}}", "did you mean 'model.encoder'?"),
        ("micro_batch: 2", "did you mean 'train.micro_batch' or 'evaluate.micro_batch'?"),
        ("model: {evaluate_evry: 2}", "did you mean 'train.evaluate_every'?"),
        ("train: {ema: {rampp: 2}}", "did you mean 'ramp'?"),
        ("balancing: {weights: {hieght: 2}}", "did you mean 'height'?"),
        ("model: {neck: {qqq: 2}}", "allowed here: width, repeats"),
    ],
)
def test_unknown_key_gets_the_right_suggestion(problems, text, suggestion):
    (line,) = problems(f"tasks: {{height: {{}}}}\n{text}\n")
    assert line.endswith(f"unknown key; {suggestion}")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train: {steps: true}", "train.steps = true: must be a valid integer"),
        ('train: {steps: "10"}', 'train.steps = "10": must be a valid integer'),
        ("train: {steps: 1.5}", "train.steps = 1.5: must be a valid integer"),
        ("train: {optimizer: {lr: .nan}}", "train.optimizer.lr = NaN: must be a finite number"),
        ("train: {optimizer: {betas: [0.9, 2]}}", "train.optimizer.betas.1 = 2: must be less than 1"),
        ("train: {ema: 4}", "train.ema = 4: must be a block of keys: decay, ramp"),
        ("data: {roots: a/b}", 'data.roots = "a/b": must be a list'),
        ("data: {split_fractions: [1, 1, 1]}", "data.split_fractions = [1, 1, 1]: must add up to 1, not 3"),
        ("data: {augment: {scale: [2, 1]}}", "data.augment.scale = [2, 1]: must be [smallest, largest]"),
        ("log: {wandb: {}}", "log.wandb.project: must be given"),
        ("balancing: {weights: {height: -1}}", "balancing.weights.height = -1: must be greater than or equal to 0"),
    ],
)
def test_wrong_value_is_shown_with_what_is_allowed(problems, text, problem):
    assert problems(f"tasks: {{height: {{}}}}\n{text}\n") == [problem]


@pytest.mark.parametrize("text", ["", "tasks:", "tasks: {}", "seed: 3"])
def test_config_without_a_task_says_which_there_are(problems, text):
    (line,) = problems(text)
    assert line.startswith("tasks = {}: ")
    assert line.endswith("must name at least one task to train: height, colour")


@pytest.mark.parametrize("name", ["../elsewhere", "/tmp/x", "", "a//b", ".hidden"])
def test_run_name_stays_below_the_folder_of_runs(problems, name):
    (line,) = problems(f"run: '{name}'\ntasks: {{height: {{}}}}")
    assert line.startswith(f'run = "{name}": must ')


def test_keys_given_twice_are_refused_with_both_lines(problems):
    assert problems("tasks: {height: {}}\ntrain:\n  steps: 1\n  steps: 2\nseed: 1\nseed: 2\n") == [
        "line 4: key 'steps' is given again, first in line 3",
        "line 6: key 'seed' is given again, first in line 5",
    ]


def test_a_key_that_overrides_what_is_merged_is_not_given_twice():
    # PyYAML merges into `b` before it constructs it, since the mapping that refers to it is less deep
    text = "z: {k: &b {<<: {x: 1}, x: 2}}\nc: {<<: *b, x: 3}\n"
    assert _parse_yaml(text) == ({"z": {"k": {"x": 2}}, "c": {"x": 3}}, [])


@pytest.mark.parametrize(
    ("text", "number"), [("1e-3", 0.001), ("1E-3", 0.001), ("+2.5e-4", 0.00025), (".5e-2", 0.005), ("1.e-3", 0.001)]
)
def test_numbers_with_an_exponent_are_numbers(load, text, number):
    assert load(f"tasks: {{height: {{}}}}\ntrain: {{optimizer: {{lr: {text}}}}}").train.optimizer.lr == number
    assert load("tasks: {height: {}}", f"train.optimizer.lr={text}").train.optimizer.lr == number


def test_whole_number_may_be_written_with_an_exponent(load):
    assert load("tasks: {height: {}}", "train.steps=6e4").train.steps == 60000


def test_reading_configs_leaves_yaml_itself_unchanged(load):
    load("tasks: {height: {}}")
    assert yaml.safe_load("[1e-3, 2024-01-01]")[0] == "1e-3"
    assert not isinstance(yaml.safe_load("[1e-3, 2024-01-01]")[1], str)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: [1", "line 1: is not YAML"),
        ("- 1", "must hold keys and values"),
        ("a: &a [*a]", "is not YAML for a config"),
    ],
)
def test_file_that_is_no_config_is_named(problems, text, problem):
    (line,) = problems(text)
    assert line.startswith(problem)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load_config(tmp_path / "nowhere.yaml", [], TASKS)


def test_overrides_apply_in_order_and_add_what_is_not_there(load):
    config = load(
        "tasks: {height: {width: 8}}",
        "tasks.height.width=9",
        "tasks.height.width=10",
        "tasks.colour={}",
        "data.roots=[a, b]",
        "train.ema=null",
    )
    assert config.tasks == {"height": Height(width=10), "colour": Colour()}
    assert config.data.roots == ["a", "b"]
    assert config.train.ema is None


def test_override_with_null_removes_a_task(load, problems):
    text = "tasks: {height: {}, colour: {}}\nbalancing: {weights: {colour: 2}}"
    assert load(text, "tasks.colour=null").tasks == {"height": Height()}
    assert problems(text, "tasks.color=null") == [
        "tasks.color = null: unknown key; did you mean 'colour'? (from the command line)"
    ]


def test_override_of_one_of_two_blocks_that_share_a_text_changes_one(load):
    config = load("tasks: {height: {}}\ntrain: &x {micro_batch: 2}\nevaluate: *x", "evaluate.micro_batch=3")
    assert (config.train.micro_batch, config.evaluate.micro_batch) == (2, 3)


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("train", "override 'train' must have the form key=value, as in train.steps=100"),
        ("=3", "override '=3' must have the form key=value, as in train.steps=100"),
        ("train..steps=3", "override 'train..steps=3' must have the form key=value, as in train.steps=100"),
        ("seed.x=3", "override 'seed.x=3': seed = 1 has no keys below it"),
        ("train={steps: 1, steps: 2}", "override 'train={steps: 1, steps: 2}': line 1: key 'steps' is given again"),
        ("seed=[", "override 'seed=[': line 1: is not YAML"),
        ("sed=3", "sed = 3: unknown key; did you mean 'seed'? (from the command line)"),
    ],
)
def test_wrong_override_is_named(problems, override, problem):
    (line,) = problems("seed: 1\ntasks: {height: {}}", override)
    assert line.startswith(problem)


ASYNC = "update: async, groups: {encoder: {lr: 1e-3, samples: 8}, height: {lr: 1e-4, samples: 3}}"


def test_groups_of_an_asynchronous_update_belong_to_encoder_and_tasks(load, tmp_path):
    config = load(f"tasks: {{height: {{}}}}\ntrain: {{{ASYNC}}}")
    assert {name: (group.lr, group.samples) for name, group in config.train.groups.items()} == {
        "encoder": (1e-3, 8),
        "height": (1e-4, 3),
    }
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml", ["run=trial"], TASKS) == config
    # a task that is left out may keep its group, as it may keep its weight
    fewer = load(f"tasks: {{height: {{}}, colour: {{}}}}\ntrain: {{{ASYNC}}}", "tasks.colour=null")
    assert fewer.train.groups == config.train.groups


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (
            f"tasks: {{height: , colour: }}\ntrain: {{{ASYNC}}}",
            "update: async needs groups for colour, each with lr and",
        ),
        (
            "tasks: {height: }\ntrain: {update: async}",
            "update: async needs groups for encoder, height, each with lr and",
        ),
        (f"tasks: {{height: }}\ntrain: {{{ASYNC}, precision: fp16}}", "fp16 needs one loss scale"),
        (
            f"tasks: {{height: }}\ntrain: {{{ASYNC}, optimizer: {{lr: 1}}}}",
            "update: async has no use for optimizer and",
        ),
        ("tasks: {height: }\ntrain: {groups: {height: {lr: 1, samples: 2}}}", "groups are for update: async"),
        (f"tasks: {{height: }}\ntrain: {{{ASYNC[:-2]}, lrr: 1}}}}}}", "unknown key; did you mean 'lr'?"),
        (f"tasks: {{height: }}\ntrain: {{{ASYNC[:-1]}, hieght: {{}}}}}}", "unknown key; did you mean 'height'?"),
    ],
)
def test_groups_that_do_not_fit_are_named(problems, text, problem):
    (line,) = problems(text)
    assert line.startswith("train") and problem in line


@pytest.mark.parametrize("run", ["plain", "1e-3", "2024-01-01", "null", "yes", "1_000", "ä b/c", "12", "~"])
def test_saved_config_is_the_same_config_again(load, tmp_path, run):
    config = load(
        f"run: '{run}'\ndeterministic: true\ntasks: {{colour: , height: {{levels: [a, '1e3']}}}}\n"
        "train: {optimizer: {lr: 1e-5, clip: null}}\nmodel: {input_size: [64, 32]}\n"
        "balancing: {weights: {height: 0.5}}\nlog: {wandb: {project: p, mode: offline}}\n"
    )
    save_config(config, tmp_path / "saved" / "config.yaml")
    again = load_config(tmp_path / "saved" / "config.yaml", [], TASKS)
    assert again == config
    assert again.run == run
    assert config_to_dict(again) == config_to_dict(config)


def test_resolved_config_names_every_default(load):
    resolved = config_to_dict(load("tasks: {height: {}}"))
    assert resolved["train"]["ema"] == {"decay": 0.9995, "ramp": 2000}
    assert resolved["tasks"] == {"height": {"width": 64, "levels": ["neck.4"]}}


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("train.batch_size=8", "train.micro_batch"),
        ("batch_size=8", "train.micro_batch"),
        ("evaluate.batch-size=8", "evaluate.micro_batch"),
        ("epochs=3", "updates, each after train.cycle micro-batches of each task"),
        ("train.epochs=3", "there are no epochs"),
        ("model.backbone=resnet50", "model.encoder.name"),
        ("train.learning_rate=0.1", "train.optimizer.lr"),
        ("train.lr=0.1", "train.optimizer.lr"),
        ("optimizer.name=adam", "it is always AdamW"),
        ("train.optimizer.name=adam", "it is always AdamW"),
        ("train.wd=0.1", "train.optimizer.weight_decay"),
        ("amp=true", "train.precision"),
        ("gpus=2", "train.device"),
        ("train.iterations=9", "train.steps"),
        ("max_steps=9", "train.steps"),
        ("data.root=x", "data.roots"),
        ("data.path=x", "data.roots"),
        ("model.encoder.path=x", "allowed here: name, pretrained, weights, norm"),
        ("train.resume=true", "--resume"),
        ("model.img_size=3", "model.input_size"),
        ("image_size=3", "model.input_size"),
        ("data.num_workers=2", "data.workers"),
        ("train.device=0", "write cuda:0"),
        ("train.device=2", "write cuda:2"),
        ("train.device=true", "write cuda:0"),
        ("train.device=-1", "write cuda:0"),
        ("run=5", 'must be text, for which YAML needs quotes: "5"'),
        ('run="a\\0b"', "must be a name below runs/"),
        ("data.limit=-33", "data.limit = -33: must be greater than 0"),
        ("run=/tmp/run", "--run FOLDER"),
        ("run=../run", "--run FOLDER"),
        ("balancing.weights={height: 0, colour: 0}", "balancing.weights gives every task 0"),
    ],
)
def test_words_of_other_projects_and_common_slips_get_an_answer(tmp_path, override, answer):
    path = tmp_path / "c.yaml"
    path.write_text("tasks: {height: {}, colour: {}}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, [override], TASKS)
    assert answer in str(caught.value) and len(caught.value.problems) == 1


@pytest.mark.parametrize(("character", "name"), [("\a", "U+0007"), ("\x00", "U+0000"), ("\x1b", "U+001B")])
def test_a_control_character_is_named_with_its_place(tmp_path, character, name):
    path = tmp_path / "c.yaml"
    path.write_text(f"seed: 1\ntasks: {{height: {character}}}\n")
    with pytest.raises(ConfigError, match=rf"line 2: is not YAML: the character {re.escape(name)} in column 17"):
        load_config(path, [], TASKS)
    path.write_text(f"\ufefftasks: {character}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"line 1: is not YAML: the character {re.escape(name)} in column 8"):
        load_config(path, [], TASKS)
    path.write_text("tasks: {height: }\n")
    with pytest.raises(ConfigError, match=rf"override .*the character {re.escape(name)}") as caught:
        load_config(path, [f"seed={character}"], TASKS)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "override"),
    [
        ("tasks: {height: }", "a\nb=3"),
        ("tasks: {height: }", "seed=[\n"),
        ("tasks: {height: }", "a\x1b[31mb=3"),
        ('tasks: {height: }\n"a\\nb": 1', "seed=1"),
        ('tasks: {height: }\n"a\\eb": 1', "seed=1"),
        ('tasks: {height: }\n"a\\nb": 1\n"a\\nb": 1', "seed=1"),
    ],
)
def test_a_problem_is_one_line_that_a_terminal_can_show(load, text, override):
    with pytest.raises(ConfigError) as caught:
        load(text, override)
    assert all(line.isprintable() for line in caught.value.problems)
    assert str(caught.value).splitlines() == caught.value.problems


def test_what_is_nested_too_deeply_is_refused(problems):
    assert problems("[" * 5000) == ["is not YAML for a config: it is nested too deeply"]
    (line,) = problems("tasks: {height: }", f"seed={'[' * 5000}")
    assert line.startswith("override") and line.endswith("it is nested too deeply")


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_is_named(tmp_path, encoding):
    path = tmp_path / "c.yaml"
    path.write_text("tasks: {height: }\nrun: Übung\n", encoding=encoding)
    with pytest.raises(ConfigError, match=r"c\.yaml: is not a text file in UTF-8$"):
        load_config(path, [], TASKS)


@pytest.mark.parametrize("weights", ["{height: 0}", "{height: 0, colour: 1}", "{height: 0.0, colour: 1e-3}"])
def test_one_weight_above_zero_is_enough(load, weights):
    load("tasks: {height: {}, colour: {}}", f"balancing.weights={weights}")


def test_weights_of_chosen_tasks_alone_decide(problems):
    """A weight that a task which does not train keeps is no weight above 0."""
    text = "tasks: {height: {}}\nbalancing: {weights: {height: 0, colour: 1}}"
    (line,) = problems(text)
    assert line.endswith("balancing.weights gives every task 0, so nothing would be learned; give one more than 0")


def test_a_byte_order_mark_is_no_character_of_the_first_key(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("\ufeffseed: 7\ntasks: {height: }\n", encoding="utf-8")
    assert load_config(path, [], TASKS).seed == 7
