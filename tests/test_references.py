"""What a page, a comment or a message refers to exists: files, sections, tests, commands, options and config keys."""

import ast
import re
import subprocess
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from a2d2.download.sets import PARTS
from docs.draw_network import draw_network
from tasks import TASKS
from training.config import Config, load_config

ROOT = Path(__file__).resolve().parent.parent
TRACKED = subprocess.run(
    ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
).stdout.split("\n")
FILES = [ROOT / name for name in TRACKED if name and (ROOT / name).is_file()]
PAGES = [path for path in FILES if path.suffix == ".md"]
# the format page names files of other repositories, and the changelog those of before
OUR_PAGES = [path for path in PAGES if path.name not in ("a2d2-format.md", "CHANGELOG.md")]
SOURCES = [path for path in FILES if path.suffix in (".py", ".sh", ".yaml", ".yml", ".toml") or path.name == "Makefile"]
README = (ROOT / "README.md").read_text(encoding="utf-8")

if not FILES:
    pytest.skip("not a git checkout", allow_module_level=True)


def read(path):
    return path.read_text(encoding="utf-8")


def show(path, text):
    return f"{path.relative_to(ROOT)}: {text}"


# ---------------------------------------------------------------- sections of the format page


def list_sections():
    page = read(ROOT / "docs/a2d2-format.md")
    return set(re.findall(r"^##+ (\d+(?:\.\d+)?)\.? ", page, re.MULTILINE))


def test_every_cited_section_of_the_format_page_exists():
    sections, cited = list_sections(), 0
    for path in [*SOURCES, *OUR_PAGES]:
        text = re.sub(r"\s*\n\s*(?:# )?", " ", read(path))
        for numbers in re.findall(r"a2d2-format\.md`?,? sections? ((?:\d+(?:\.\d+)?(?:, | and )?)+)", text):
            for number in re.findall(r"\d+(?:\.\d+)?", numbers):
                assert number.rstrip(".") in sections, show(path, f"section {number}")
                cited += 1
    assert cited > 20


def test_every_assumption_of_the_check_cites_a_section():
    from a2d2.checks.assumptions import ASSUMPTIONS

    # "11.2" is the second item of the list in section 11
    for name, assumption in ASSUMPTIONS.items():
        assert {assumption.source, assumption.source.partition(".")[0]} & list_sections(), name


def test_nobody_cites_a_page_that_is_not_here():
    for path in [*SOURCES, *PAGES]:
        if path.name != Path(__file__).name:
            assert not re.search(r"format notes|\.\./shared|DESIGN\.md", read(path)) or path.parts[-2] == ".ci", path


# ---------------------------------------------------------------- files and tests

SUFFIXES = "py|md|sh|yaml|yml|toml|lock|svg|jpg|cff"
FILE = re.compile(rf"(?<![\w/.{{<*-])((?:[\w.-]+/)*[\w.-]+\.(?:{SUFFIXES}))(?![\w/*])")
# names of files that a program writes, a user chooses or another project has
FOREIGN = {
    "frame34862_image.jpg",
    "idd20k_lite/leftImg8bit/train/472/frame34862_image.jpg",
    "config.yaml",
    "FILE.yaml",
    "my.yaml",
    "name.yaml",
    "tiny.yaml",
}


def find_missing_files(path, text):
    for name in FILE.findall(text):
        places = (
            ROOT / name,
            path.parent / name,
            *(ROOT / folder / name for folder in ("a2d2", "benchmarks", "configs", "docs", "preprocessing")),
        )
        if name not in FOREIGN and not any(place.exists() for place in places):
            yield name


@pytest.mark.parametrize("path", OUR_PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_that_a_page_names_exists(path):
    text = read(path)
    quoted = " ".join(" ".join(groups) for groups in re.findall(r"`([^`\n]+)`|\]\(([^)#]+)\)", text))
    commands = " ".join(re.findall(r"^    (.+)$", text, re.MULTILINE)).replace("$script", "camera")
    assert not list(find_missing_files(path, f"{quoted} {commands}"))


def test_every_file_that_a_comment_names_by_its_folder_exists():
    folders = "a2d2|benchmarks|configs|docs|models|pictures|preprocessing|scoring|slurm|tasks|tests|training"
    pattern = re.compile(rf"(?<![\w/.-])((?:{folders})/(?:[\w.-]+/)*[\w.-]+\.(?:{SUFFIXES}))(?![\w/*])")
    for path in SOURCES:
        if path.parent.name == "tests":  # tests write files of their own
            continue
        for name in pattern.findall(read(path)):
            assert (ROOT / name).exists(), show(path, name)


def test_every_test_that_a_page_names_exists():
    found = 0
    for path in PAGES:
        for file, name in re.findall(r"(tests/\w+\.py)::(\w+)", read(path)):
            assert re.search(rf"^def {name}\(", read(ROOT / file), re.MULTILINE), show(path, f"{file}::{name}")
            found += 1
    assert found >= 14


# ---------------------------------------------------------------- commands


def list_commands():
    """(page, command) of every indented line of a page, docstring or header that starts a program."""
    start = re.compile(r"^(?:    |```)?\s*((?:python|sh|make|\.venv/bin/python|torchrun|sbatch)\b[^#`\n]*)")
    for path in [*OUR_PAGES, *[path for path in SOURCES if path.suffix in (".py", ".yaml", ".sh")]]:
        if path.parent.name in ("tests", ".ci"):
            continue
        for line in read(path).splitlines():
            found = start.match(line.lstrip("#").replace("$script", "camera"))
            if found and (path.suffix != ".py" or line.startswith(("    python", "python", "sh "))):
                yield path, re.split(r"\s{3,}", found[1].strip())[0]


def list_options(script):
    """The options of a script, by its source and that of the module that holds common ones."""
    text = read(script) + (read(ROOT / "preprocessing/_common.py") if script.parent.name == "preprocessing" else "")
    return set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', text)) | {"--help"}


COMMANDS = list(list_commands())


def test_there_are_commands():
    assert len(COMMANDS) > 20


@pytest.mark.parametrize(("path", "command"), COMMANDS, ids=[command[:60] for _, command in COMMANDS])
def test_every_command_exists_with_its_options(path, command):
    words = command.replace("[", " ").replace("]", " ").split()
    if words[0] == "make":
        targets = set(re.findall(r"^([\w-]+):", read(ROOT / "Makefile"), re.MULTILINE))
        assert all(word in targets for word in words[1:2] if re.fullmatch(r"[a-z]+", word)), show(path, command)
        return
    if words[0] == "sh":
        assert (ROOT / words[1]).is_file(), show(path, command)
        options = list_options(ROOT / "a2d2/download/__main__.py")
        arguments = [word for word in words[2:] if re.fullmatch(r"[a-z-]+", word)]
        assert all(word in (*PARTS, *options) for word in arguments), show(path, command)
        return
    if words[1:2] == ["-m"]:
        if words[2].split(".")[0] not in ("a2d2",):
            return
        script = ROOT / words[2].replace(".", "/") / "__main__.py"
    else:
        script = ROOT / next((word for word in words if word.endswith((".py", ".sh"))), "no script")
    assert script.is_file(), show(path, command)
    if script.suffix == ".sh":  # a job script, which hands its arguments on
        return
    if "--" in words:  # what stands before is torchrun's
        words = words[words.index("--") + 1 :]
    unknown = {word for word in words if word.startswith("--")} - list_options(script)
    assert not unknown, show(path, f"{command}: {unknown}")
    for word in words:
        if word.startswith("configs/") and "*" not in word:
            assert (ROOT / word).is_file(), show(path, command)


# ---------------------------------------------------------------- config keys


def list_keys(schema, prefix=""):
    for name, field in schema.model_fields.items():
        key = f"{prefix}{name}"
        yield key
        for inner in (field.annotation, *typing.get_args(field.annotation)):
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from list_keys(inner, f"{key}.")


OPTIONS = {name: task.Options for name, task in TASKS.items()}
KEYS = set(list_keys(type(load_config(ROOT / "configs/symmetric.yaml", [], OPTIONS))))
KEY = re.compile(rf"(?<![\w./])((?:{'|'.join(set(Config.model_fields) - {'run', 'seed'})})(?:\.[a-z_0-9]+)+)(?![\w(/])")


def is_key(text):
    """Whether it is a key, or an item of a block whose names are free (`balancing.weights.depth`, `train.groups.x`)."""
    return text in KEYS or text.rpartition(".")[0] in {"balancing.weights", "train.groups"}


def find_unknown_keys(text):
    for found in KEY.findall(text):
        if not is_key(found) and not re.search(r"\.(py|yaml|md|safetensors|json|jsonl)$", found):
            yield found


@pytest.mark.parametrize("path", OUR_PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_config_key_that_a_page_names_exists(path):
    quoted = " ".join(re.findall(r"`([^`\n]+)`", read(path)))
    commands = " ".join(re.findall(r"^    (.+)$", read(path), re.MULTILINE))
    modules = {f"tasks.{path.stem}" for path in (ROOT / "tasks").glob("*.py")}
    assert not set(find_unknown_keys(f"{quoted} {commands}")) - modules


def test_every_config_key_that_a_message_or_a_header_names_exists():
    """In strings with spaces (messages, docstrings, descriptions of options) and in comments of configs."""
    for path in SOURCES:
        if path.suffix == ".yaml" and path.parts[-2] != ".github":
            texts = [line.partition("#")[2] for line in read(path).splitlines()]
        elif path.suffix == ".py" and path.parent.name != "tests":
            nodes = ast.walk(ast.parse(read(path)))
            texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
            texts = [text for text in texts if " " in text]
        else:
            continue
        modules = {f"{folder}.{each.stem}" for folder in ("tasks",) for each in (ROOT / folder).glob("*.py")}
        for text in texts:
            unknown = set(find_unknown_keys(text)) - modules
            assert not unknown, show(path, unknown)


# ---------------------------------------------------------------- the tree, the drawing, what may be in git


def test_the_tree_of_the_readme_is_the_tree():
    block = README.partition("## The tree")[2].partition("\n## ")[0]
    named = set()
    for line in re.findall(r"^    (\S.*?)(?:   |$)", block, re.MULTILINE):
        named |= {name for name in re.split(r"\s+", line) if name}
    for name in named:
        assert (ROOT / name).exists(), name
    top = {path.relative_to(ROOT).parts[0] for path in FILES}
    shown = {name.split("/")[0] for name in named}
    hidden = {name for name in top if name.startswith(".")}
    other = {"README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", "pyproject.toml", "requirements.lock", "Datasets"}
    assert top - hidden - other <= shown, top - hidden - other - shown


def test_the_drawing_shows_the_network_of_today(tmp_path):
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none"}):
        draw_network(ROOT / "configs/symmetric.yaml").savefig(tmp_path / "network.svg")
    now, kept = (
        re.findall(r"<text[^>]*>([^<]*)", read(path)) for path in (tmp_path / "network.svg", ROOT / "docs/network.svg")
    )
    assert now == kept, "run python docs/draw_network.py"


def test_pictures_are_small_and_nothing_large_is_in_git():
    for path in FILES:
        limit = 400 if path.suffix in (".svg", ".png", ".jpg") else 1024
        assert path.stat().st_size <= limit * 1024, path
