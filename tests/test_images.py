"""Readers refuse incomplete files; writers leave a complete file or none."""

import errno
import os
import socket
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest

from a2d2.images import (
    ImageError,
    decode_rgb_png,
    encode_jpeg,
    encode_png,
    read_depth_png,
    read_image,
    sweep_temporary,
    write_bytes,
    write_json,
    write_npy,
)

PICTURE = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
DEPTH = np.array([[0, 1, 255, 256], [257, 4660, 65280, 65535]], dtype=np.uint16)


def test_png_keeps_every_value(tmp_path):
    assert (decode_rgb_png(encode_png(PICTURE)) == PICTURE).all()
    assert (decode_rgb_png(encode_png(PICTURE), (7, 5)) == PICTURE).all()
    write_bytes(tmp_path / "depth.png", encode_png(DEPTH))
    found = read_depth_png(tmp_path / "depth.png")
    assert found.dtype == np.uint16 and (found == DEPTH).all()
    assert (cv2.imread(str(tmp_path / "depth.png"), cv2.IMREAD_UNCHANGED) == DEPTH).all()


def test_pictures_are_rgb_in_both_formats(tmp_path):
    picture = np.zeros((16, 16, 3), np.uint8)
    picture[:, :, 0], picture[:, :, 1] = 250, 90
    for name, data in (("a.jpg", encode_jpeg(picture)), ("a.png", encode_png(picture))):
        write_bytes(tmp_path / name, data)
        assert np.abs(read_image(tmp_path / name).astype(int) - picture).max() <= 3


def test_jpeg_keeps_thin_coloured_lines():
    picture = np.full((32, 32, 3), 128, np.uint8)
    picture[:, 9] = (255, 0, 0)
    decoded = cv2.imdecode(np.frombuffer(encode_jpeg(picture), np.uint8), cv2.IMREAD_COLOR_RGB)
    assert (decoded[:, 9, 0] > 235).all() and (decoded[:, 9, 1:] < 20).all()
    assert np.abs(decoded[:, 10].astype(int) - 128).max() < 20


@pytest.mark.parametrize("kind", ["rgb", "depth"])
def test_a_damaged_png_is_refused_wherever_the_damage_is(tmp_path, kind):
    image = PICTURE if kind == "rgb" else DEPTH
    path = tmp_path / "image.png"
    data = encode_png(image)
    cuts = [data[:length] for length in range(len(data))]
    flips = [data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :] for at in range(len(data))]
    refused = 0
    for damaged in cuts + flips:
        path.write_bytes(damaged)
        try:
            found = decode_rgb_png(damaged) if kind == "rgb" else read_depth_png(path)
        except ImageError:
            refused += 1
        else:
            assert (found == image).all()  # the damage does not affect the pixels
    assert refused > 0.8 * len(cuts + flips)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((4, 4), np.uint8), "8 bit gray"),
        (np.zeros((4, 4, 4), np.uint8), "8 bit RGBA"),
        (np.zeros((4, 4, 3), np.uint16), "16 bit RGB"),
    ],
)
def test_other_kinds_of_png_are_refused_by_name(tmp_path, image, words):
    data = cv2.imencode(".png", image)[1].tobytes()
    with pytest.raises(ImageError, match=f"{words}, expected 8 bit RGB"):
        decode_rgb_png(data)
    (tmp_path / "depth.png").write_bytes(data)
    with pytest.raises(ImageError, match=f"{words}, expected 16 bit gray"):
        read_depth_png(tmp_path / "depth.png")


def test_another_size_than_expected_shows_both():
    with pytest.raises(ImageError, match=r"7x5.*1920x1208"):
        decode_rgb_png(encode_png(PICTURE), (1920, 1208))


def test_a_cut_jpeg_is_refused_and_named(tmp_path):
    path = tmp_path / "picture.jpg"
    data = encode_jpeg(np.repeat(np.repeat(PICTURE, 8, 0), 8, 1))
    path.write_bytes(data)
    read_image(path)
    for damaged in (b"", data[:1], data[:-2], data[: len(data) // 2], encode_png(PICTURE)):
        path.write_bytes(damaged)
        with pytest.raises(ImageError, match=r"picture\.jpg.*camera\.py"):
            read_image(path)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "label.npy"
    write_npy(path, DEPTH)
    before = path.read_bytes()

    def refuse(self, target):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr("pathlib.Path.replace", refuse)
    with pytest.raises(OSError, match=r"No space left on device.*label\.npy'$") as error:
        write_npy(path, DEPTH.T)
    assert error.value.filename == str(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_json_cannot_hold_nan(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "angle.json", {"angle_deg": float("nan")})
    assert not list(tmp_path.iterdir())


def test_only_what_nobody_writes_any_more_is_swept(tmp_path):
    host = socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    zombie = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)  # a zombie: ended, but not yet waited for
    names = {
        f".a.png.{host}.{dead.pid}.partial": False,
        f".b.png.{host}.{zombie.pid}.partial": False,
        f".c.png.{host}.{os.getpid()}.partial": True,
        f".d.png.other-{host}.{dead.pid}.partial": True,
        f".e.png.far.away.{dead.pid}.partial": True,
        ".f.png.far.away.1.partial": False,  # a day old
        "g.png": True,
        ".partial": True,
    }
    folder = tmp_path / "scene" / "camera"
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).touch()
    os.utime(folder / ".f.png.far.away.1.partial", (time.time() - 25 * 3600,) * 2)
    assert sweep_temporary(tmp_path) == list(names.values()).count(False)
    assert {path.name for path in folder.iterdir()} == {name for name, kept in names.items() if kept}
    zombie.wait()
