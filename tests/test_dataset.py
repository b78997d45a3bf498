"""The sample key by key, augmentation of image and targets together, and datasets that cannot be used."""

import numpy as np
import pytest
import torch
from derived_root import MATRIX, SIZE, write_identity, write_root
from torch.utils.data import DataLoader

from a2d2.dataset import Augmentation, DatasetError, FrameDataset, Geometry, index_roots
from tasks import TASKS

KINDS = {name: task.kind for name, task in TASKS.items()}
NAMES = tuple(TASKS)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    path = tmp_path_factory.mktemp("root")
    write_root(path)
    return path


def open_root(root, **options):
    frames, roots = index_roots([root], ["front_center"])
    return FrameDataset(frames, roots, {name: task() for name, task in TASKS.items()}, **options)


def flatten(sample):
    """All tensors of a sample in a fixed order."""
    leaves, _ = torch.utils._pytree.tree_flatten(sample)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]


def are_equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(flatten(first), flatten(second), strict=True))


def test_a_sample_has_the_documented_keys_and_types(root):
    sample = open_root(root)[0]
    assert set(sample) == {"image", "targets", "camera", "frame"}
    assert sample["image"].shape == (3, 64, 64) and sample["image"].dtype == torch.uint8
    assert sample["camera"].dtype == torch.float32
    assert torch.equal(sample["camera"], torch.from_numpy(MATRIX).float())
    assert sample["frame"] == "20180101_000000/front_center/000000001"
    targets = sample["targets"]
    assert targets["segmentation"].shape == (64, 64) and targets["segmentation"].dtype == torch.uint8
    assert targets["depth"].shape == (64, 64) and targets["depth"].dtype == torch.float32
    assert targets["steering"].shape == (1,) and targets["steering"].dtype == torch.float32
    assert {key: value.dtype for key, value in targets["detection"].items()} == {
        "boxes": torch.float32,
        "classes": torch.int64,
        "known": torch.int64,
        "visible": torch.float32,
        "size": torch.int64,
        "annotated": torch.bool,
    }


@pytest.mark.parametrize("for_training", [False, True])
def test_a_batch_has_the_rows_that_have_a_label_and_nothing_of_others(root, for_training):
    dataset = open_root(root, for_training=for_training)
    (batch,) = DataLoader(dataset, batch_size=len(dataset), collate_fn=dataset.collate)
    for name, task in dataset.tasks.items():
        there = [row for row, frame in enumerate(dataset.frames) if frame.path(KINDS[name]).is_file()]
        assert batch["rows"][name].tolist() == there and 0 < len(there) < len(dataset)
        for place, row in enumerate(there):
            target = dataset[row]["targets"][name]
            whole = torch.utils._pytree.tree_map(lambda leaf, place=place: leaf[place], batch["targets"][name])
            assert are_equal(whole, target)
            if for_training:
                assert batch["counts"][name][place] == task.count(task.collate([target]))[0]
    assert for_training == ("counts" in batch)
    # a frame that is labelled as empty has a label; one without a label has no row
    empty = batch["frame"].index("20180102_000000/front_center/000000004")
    row = batch["rows"]["detection"].tolist().index(empty)
    assert (batch["targets"]["detection"]["classes"][row] == -1).all()
    bare = dataset.collate([dataset[len(dataset) - 1]])
    assert bare["targets"] == bare["rows"] == {} and len(bare["image"]) == 1


def test_names_say_whose_labels_are_loaded(root):
    sample = open_root(root)[0, 7, ("depth",)]
    assert set(sample["targets"]) == {"depth"}


def test_an_augmented_sample_depends_on_its_seed_alone(root):
    augmentation = Augmentation(flip=0.5, scale=(1.0, 2.0), color=0.5)
    first, second = (open_root(root, augmentation=augmentation) for _ in range(2))
    for index in reversed(range(len(first))):
        second[index, index + 99, NAMES]
    torch.manual_seed(5)
    np.random.seed(5)
    assert all(are_equal(first[i, i, NAMES], second[i, i, NAMES]) for i in range(len(first)))
    variants = [first[0, seed, NAMES] for seed in range(6)]
    assert not any(are_equal(variants[0], other) for other in variants[1:])
    # the image does not depend on which labels are loaded
    assert torch.equal(first[0, 3, ("depth",)]["image"], first[0, 3, NAMES]["image"])
    # without a seed nothing is random
    assert are_equal(first[0], open_root(root)[0])


def test_a_mirrored_sample_is_mirrored_in_all_its_parts(root):
    straight = open_root(root)[0]
    turned = open_root(root, augmentation=Augmentation(flip=1.0))[0, 0, NAMES]
    assert torch.equal(turned["image"], straight["image"].flip(2))
    for name in ("segmentation", "depth"):
        assert torch.equal(turned["targets"][name], straight["targets"][name].flip(1))
    assert turned["targets"]["steering"] == -straight["targets"]["steering"] != 0
    boxes, mirrored = straight["targets"]["detection"]["boxes"][:2], turned["targets"]["detection"]["boxes"][:2]
    assert torch.equal(mirrored, torch.stack([64 - boxes[:, 2], boxes[:, 1], 64 - boxes[:, 0], boxes[:, 3]], dim=1))
    assert turned["camera"][0, 2] == 63 - straight["camera"][0, 2]


@pytest.mark.parametrize("flip", [False, True])
def test_camera_and_boxes_agree_on_where_things_are(flip):
    geometry = Geometry((64, 48), (10, 7, 32, 24), (96, 80), flip)
    matrix = np.array([[50.0, 0, 30.0], [0, 52.0, 23.0], [0, 0, 1]])
    point = np.array([-0.2, 0.1, 1.0])
    before = matrix @ point + 0.5  # pixel centres are integers for the camera; edges are, for boxes
    mirrored = point * [-1, 1, 1] if flip else point
    after = geometry.map_camera(matrix) @ mirrored + 0.5
    assert geometry.map_boxes(np.array([[*before[:2], *before[:2]]]))[0, :2] == pytest.approx(after[:2])


def test_nearest_sampling_takes_the_pixel_under_each_centre():
    array = np.arange(48 * 64).reshape(48, 64)
    geometry = Geometry((64, 48), (8, 4, 32, 24), (64, 48))
    assert np.array_equal(geometry.sample_nearest(array), array[4:28, 8:40].repeat(2, axis=0).repeat(2, axis=1))


def test_targets_may_keep_another_size_than_the_image(root):
    sample = open_root(root, size=(32, 32), target_size=SIZE)[0]
    assert sample["image"].shape == (3, 32, 32)
    assert are_equal(sample["targets"], open_root(root)[0]["targets"])


def test_roots_that_do_not_fit_together_are_refused(root, tmp_path):
    write_root(tmp_path / "again")
    write_root(tmp_path / "larger", size=(96, 64))
    with pytest.raises(DatasetError, match=r"000000001 is in two roots.*again"):
        index_roots([root, tmp_path / "again"], ["front_center"])
    with pytest.raises(DatasetError, match=r"different size.*64x64.*96x64"):
        index_roots([root, tmp_path / "larger"], ["front_center"])


def test_each_frame_is_read_from_the_root_it_lies_in(root, tmp_path):
    frames = write_root(tmp_path)
    for frame in frames[1:]:
        frame.path("image").unlink()
    later = frames[0].path("image").with_name(frames[0].path("image").name.replace("000000001", "000000099"))
    frames[0].path("image").rename(later)
    together, _ = index_roots([root, tmp_path], ["front_center"])
    assert len(together) == 7
    assert {frame.id: frame.root for frame in together}["000000099"] == tmp_path
    assert sum(frame.root == root for frame in together) == 6


def test_folders_that_are_no_root_say_what_to_do(tmp_path):
    with pytest.raises(DatasetError, match=r"no dataset\.json.*preprocessing"):
        index_roots([tmp_path], ["front_center"])
    write_identity(tmp_path, kinds={"depth": {}})
    with pytest.raises(DatasetError, match=r"preprocessing/camera\.py"):
        index_roots([tmp_path], ["front_center"])
    (tmp_path / "dataset.json").write_text('{"size": [64')
    with pytest.raises(DatasetError, match="cannot be read"):
        index_roots([tmp_path], ["front_center"])


@pytest.mark.parametrize("kind", ["image", *KINDS.values()])
def test_a_cut_off_file_is_named_and_never_a_label(kind, tmp_path):
    frame = write_root(tmp_path)[0]
    path = frame.path(kind)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=path.name):
        open_root(tmp_path)[0]


def test_an_image_of_another_size_than_its_root_is_named(tmp_path):
    write_root(tmp_path)
    write_identity(tmp_path, size=(96, 64))
    with pytest.raises(DatasetError, match=r"000000001\.jpg is 64x64, its dataset 96x64"):
        open_root(tmp_path)[0]


def test_under_a_zoom_camera_depth_and_pixels_describe_one_scene():
    """The pixel of a point in the zoomed image, its depth divided by the zoom, and the camera give X and Y again."""
    source, zoomed = (128, 64), Geometry((128, 64), (32, 16, 64, 32), (128, 64))
    matrix = np.array([[100.0, 0, 63.5], [0, 100.0, 31.5], [0, 0, 1]])
    point = np.array([0.9, -0.6, 12.0])
    pixel = matrix @ point / point[2] + 0.5
    inside = (pixel[:2] - zoomed.crop[:2]) * zoomed.scale
    camera = zoomed.map_camera(matrix)
    camera[[0, 1], [0, 1]] /= zoomed.zoom
    depth = point[2] / zoomed.zoom
    again = np.linalg.inv(camera) @ np.array([*(inside - 0.5), 1]) * depth
    assert zoomed.source == source and camera[0, 0] == matrix[0, 0]
    np.testing.assert_allclose(again, [*point[:2], depth])


def test_the_camera_of_a_zoomed_sample_keeps_the_focal_length(root):
    frames, roots = index_roots([root], ["front_center"])
    dataset = FrameDataset(frames, roots, {}, augmentation=Augmentation(scale=(2.0, 2.0)))
    camera = dataset[0, 3, ()]["camera"]
    assert camera[0, 0] == MATRIX[0, 0] and camera[1, 1] == MATRIX[1, 1] and camera[0, 2] != MATRIX[0, 2]
