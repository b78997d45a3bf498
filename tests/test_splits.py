"""Splits: every frame is in one subset; splits by scene do not divide scenes."""

from itertools import product

import pytest

from a2d2.frames import Frame
from a2d2.splits import SPLITS, SUBSETS, read_listed, split_frames

FRACTIONS = [(0.7, 0.15, 0.15), (0.5, 0.5, 0.0), (0.1, 0.5, 0.4), (0.1, 0.8, 0.1), (1.0, 0.0, 0.0), (0.34, 0.33, 0.33)]


def make_frames(scenes, each=5, views=("front_center",)):
    names = [f"201801{number + 1:02d}_000000" for number in range(scenes)]
    return [Frame(name, view, f"{number:09d}") for name in names for view in views for number in range(each)]


def find_scenes(frames):
    return {frame.scene for frame in frames}


@pytest.mark.parametrize("name", SPLITS)
@pytest.mark.parametrize("scenes", [0, 1, 2, 7])
def test_every_frame_is_in_one_subset_whatever_the_order(name, scenes):
    frames = make_frames(scenes, views=("front_center", "side_left"))
    listed = {"train": [frame.scene for frame in frames]}
    subsets = split_frames(frames, name, listed=listed)
    assert tuple(subsets) == SUBSETS
    assert sorted(subsets["train"] + subsets["val"] + subsets["test"]) == sorted(frames)
    assert all(members == sorted(members) for members in subsets.values())
    assert split_frames(reversed(frames), name, listed=listed) == subsets


@pytest.mark.parametrize(
    ("scene", "number", "paper", "paper_boxes"),
    [
        ("20181108_141609", 1, "val", "val"),
        ("20181204_154421", 1, "val", "val"),
        ("20181008_095521", 54999, "train", "train"),
        ("20181008_095521", 55000, "val", "val"),
        ("20181016_125231", 1, "test", "test"),
        ("20181108_084007", 1, "test", "test"),
        ("20181204_170238", 1, "test", "test"),
        ("20180925_101535", 1, "train", "val"),
        ("20180807_145028", 60000, "train", "train"),
    ],
)
def test_the_split_of_the_paper(scene, number, paper, paper_boxes):
    frame = Frame(scene, "front_center", f"{number:09d}")
    assert split_frames([frame], "paper")[paper] == [frame]
    assert split_frames([frame], "paper_boxes")[paper_boxes] == [frame]


def test_the_thesis_validates_on_the_end_of_each_scene_and_camera():
    frames = make_frames(3, each=10, views=("front_center", "rear_center"))
    subsets = split_frames(frames, "thesis")
    assert [frame.id for frame in subsets["val"]] == ["000000008", "000000009"] * 6
    assert len(subsets["train"]) == 48 and not subsets["test"]


@pytest.mark.parametrize("fractions", FRACTIONS)
@pytest.mark.parametrize("scenes", [3, 4, 5, 20])
def test_scenes_are_kept_apart_and_each_wanted_subset_gets_some(fractions, scenes):
    subsets = split_frames(make_frames(scenes), "by_scene", fractions)
    for a, b in (("train", "val"), ("train", "test"), ("val", "test")):
        assert not find_scenes(subsets[a]) & find_scenes(subsets[b])
    for subset, fraction in zip(SUBSETS, fractions, strict=True):
        assert bool(subsets[subset]) == (fraction > 0)
        assert abs(len(find_scenes(subsets[subset])) - fraction * scenes) <= 1.5


def test_the_seed_draws_the_scenes():
    frames = make_frames(20)
    drawn = {tuple(sorted(find_scenes(split_frames(frames, "by_scene", seed=seed)["val"]))) for seed in range(5)}
    assert len(drawn) > 1
    for seed, name in product(range(3), ("paper", "thesis", "all")):
        assert split_frames(frames, name, seed=seed) == split_frames(frames, name)


def test_an_unknown_split_names_the_known():
    with pytest.raises(ValueError, match=r"random.*by_scene"):
        split_frames([], "random")


@pytest.mark.parametrize("entry", ["0012", "1.10", "1_0", "no", "2018-01-01", "null", "[a]"])
def test_a_listed_name_that_yaml_reads_as_something_else_is_refused(tmp_path, entry):
    (tmp_path / "split.yaml").write_text(f"train: [a, {entry}]")
    with pytest.raises(ValueError, match=r"split\.yaml: .* under train is no text: put the name in quotes"):
        read_listed(tmp_path / "split.yaml")
    (tmp_path / "split.yaml").write_text(f"train: [a, '{entry}']")
    assert read_listed(tmp_path / "split.yaml") == {"train": ["a", entry]}
