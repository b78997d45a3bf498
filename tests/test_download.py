"""get_data.sh with a server that breaks connections, refuses, sends wrong content and hostile archives (docs/faults.md,
rows 1 to 5)."""

import hashlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
import urllib.parse
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from a2d2.download import archives, transfer
from a2d2.download.__main__ import main
from a2d2.download.archives import list_members
from a2d2.download.errors import DownloadError
from a2d2.download.files import lock_folder
from a2d2.download.progress import format_bytes
from a2d2.download.sets import MARKER
from a2d2.download.transfer import BLOCK, OVERLAP

ROOT = Path(__file__).resolve().parent.parent
BOXES = "camera_lidar_semantic_bboxes"
BUS = "camera_lidar_semantic_bus"
SCENE = "20180807_145028"
PAGE = b"<!DOCTYPE html><html><title>503 Service Unavailable</title>" + b"x" * 1000


class Bucket(ThreadingHTTPServer):
    """Serves `files` (path -> bytes), with the next fault of `faults` for each request, and lists paths as S3 does."""

    daemon_threads = True
    # The default backlog of five drops connections when eight threads connect at once.
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.ignores_ranges = False
        self.modified = formatdate(time.time() - 1e6, usegmt=True)
        self.requests: list[tuple[str, str]] = []  # (path, value of the Range header)
        self.resume = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def respond(self, status, body, headers=(), announced=None):
        self.send_response(status)
        for name, value in (
            *headers,
            ("Content-Length", len(body) if announced is None else announced),
            ("Last-Modified", self.server.modified),
        ):
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        path, _, query = self.path.partition("?")
        path = urllib.parse.unquote(path).lstrip("/")
        wanted = self.headers.get("Range", "")
        self.server.requests.append((path, wanted))
        if query:
            return self.list_objects(urllib.parse.parse_qs(query))
        fault = ""
        if self.server.faults and path in self.server.files:
            fault = self.server.faults.pop(0)
        if fault == "503":
            return self.respond(503, PAGE)
        if fault == "page":
            return self.respond(200, PAGE)
        if path not in self.server.files:
            return self.respond(404, PAGE)
        body, status, headers = self.server.files[path], 200, []
        if wanted and not self.server.ignores_ranges:
            start = int(wanted[len("bytes=") : -1])
            if start >= len(body):
                return self.respond(416, b"")
            status, headers = 206, [("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")]
            body = body[start:]
        if fault == "cut":
            return self.respond(status, body[: len(body) * 2 // 5], headers, len(body))
        if fault == "stall":
            self.respond(status, body[: len(body) * 2 // 5], headers, len(body))
            self.server.resume.wait(20)
            return None
        return self.respond(status, body, headers)

    def list_objects(self, query):
        keys = sorted(key for key in self.server.files if key.startswith(query["prefix"][0]))
        begin = int(query.get("continuation-token", ["0"])[0])
        more = begin + 3 < len(keys)
        entries = "".join(
            f"<Contents><Key>{key}</Key><Size>{len(self.server.files[key])}</Size></Contents>"
            for key in keys[begin : begin + 3]
        )
        token = f"<NextContinuationToken>{begin + 3}</NextContinuationToken>" if more else ""
        body = (
            '<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{entries}</ListBucketResult>"
        )
        return self.respond(200, body.encode())


@pytest.fixture
def bucket(monkeypatch):
    """A server to which both environment variables point; retries do not wait."""
    server = Bucket()
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setenv("A2D2_URL", server.url)
    monkeypatch.setenv("A2D2_OBJECTS_URL", server.url)
    monkeypatch.setattr(transfer, "RETRY_PAUSES_S", (0.0, 0.0, 0.0))
    yield server
    server.resume.set()
    server.shutdown()
    thread.join()
    server.server_close()


def make_tar(files: dict, form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of {name: bytes, or a TarInfo made elsewhere}; names that end in a slash are folders."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=form) as tar:
        for name, content in files.items():
            if isinstance(content, tarfile.TarInfo):
                # Write the header only, because addfile refuses such members.
                buffer.write(content.tobuf(form))
                continue
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def make_scene(frames: int = 4, size: int = 20_000) -> dict[str, bytes]:
    """{path below the boxes folder: bytes} of a few files with names of A2D2."""
    source = random.Random(1)
    stem = SCENE.replace("_", "")
    names = [f"{SCENE}/camera/cam_front_center/{stem}_camera_frontcenter_{i:09d}.png" for i in range(frames)]
    return {name: source.randbytes(size + i) for i, name in enumerate(names)} | {"class_list.json": b"{}"}


def wrap(files: dict[str, bytes]) -> bytes:
    """The archive of the boxes set, with its top-level folder."""
    return make_tar({f"{BOXES}/": b"", **{f"{BOXES}/{name}": content for name, content in files.items()}})


def read_tree(folder: Path) -> dict[str, bytes]:
    """{relative path: bytes} of all files below a folder except the marker."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != MARKER
    }


def get(into: Path, *arguments: str) -> int:
    """Run `sh get_data.sh` in this process; return its exit code."""
    return main([*arguments, "--into", str(into)])


def find_leftovers(into: Path) -> list[Path]:
    return list(into.rglob("*.part"))


def test_default_parts_arrive_in_the_layout_that_the_index_expects(bucket, tmp_path, capsys):
    boxes, bus = make_scene(), {f"{SCENE}/bus/20180807145028_bus_signals.json": b"[]"}
    bucket.files = {f"{BOXES}.tar": wrap(boxes), f"{BUS}.tar": make_tar(bus), "cams_lidars.json": b'{"cameras": {}}'}
    assert get(tmp_path) == 0
    assert read_tree(tmp_path / BOXES) == boxes
    assert read_tree(tmp_path / BUS) == bus
    assert (tmp_path / "cams_lidars.json").read_bytes() == b'{"cameras": {}}'
    assert not find_leftovers(tmp_path)

    asked = len(bucket.requests)
    assert get(tmp_path, "--verify") == 0
    assert get(tmp_path) == 0
    assert len(bucket.requests) == asked, "complete parts are neither fetched nor unpacked again"
    assert f"boxes: {len(boxes)} files" in capsys.readouterr().out


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_dialect_unpacks_to_the_same_tree(bucket, tmp_path, form):
    files = make_scene(2)
    if form != tarfile.USTAR_FORMAT:
        files[f"{SCENE}/label/{'long' * 30}/{'name' * 30}.png"] = b"a name beyond the hundred bytes of the header"
    bucket.files[f"{BOXES}.tar"] = make_tar({f"./{BOXES}/{name}": content for name, content in files.items()}, form)
    assert get(tmp_path, "boxes") == 0
    assert read_tree(tmp_path / BOXES) == files


def test_delete_archives_keeps_the_tree_and_fetches_nothing_again(bucket, tmp_path):
    bucket.files[f"{BOXES}.tar"] = wrap(make_scene())
    assert get(tmp_path, "boxes", "--delete-archives") == 0
    assert not (tmp_path / f"archives/{BOXES}.tar").exists()
    bucket.files.clear()
    assert get(tmp_path, "boxes") == 0
    assert get(tmp_path, "--verify", "boxes") == 0
    assert read_tree(tmp_path / BOXES) == make_scene()


def test_a_connection_that_is_cut_again_and_again_is_resumed(bucket, tmp_path):
    archive = wrap(make_scene())
    bucket.files[f"{BOXES}.tar"] = archive
    # More broken connections than tries in a row, but each of them fetches some bytes.
    bucket.faults = ["cut", "503", "503", "cut", "cut", "503", "cut", "cut", "cut"]
    assert get(tmp_path, "boxes") == 0
    assert (tmp_path / f"archives/{BOXES}.tar").read_bytes() == archive
    starts = [int(wanted[6:-1]) for _, wanted in bucket.requests if wanted]
    assert starts == sorted(starts)
    assert starts[0] == len(archive) * 2 // 5
    assert read_tree(tmp_path / BOXES) == make_scene()


def test_a_server_that_ignores_ranges_loses_nothing_of_what_is_here(bucket, tmp_path):
    archive = wrap(make_scene())
    bucket.files[f"{BOXES}.tar"] = archive
    bucket.ignores_ranges, bucket.faults = True, ["cut", "503"]
    assert get(tmp_path, "boxes") == 0
    assert (tmp_path / f"archives/{BOXES}.tar").read_bytes() == archive


def test_a_server_that_never_gets_further_ends_with_one_line_and_the_rerun_goes_on(bucket, tmp_path, capsys):
    archive = wrap(make_scene(100))
    bucket.files[f"{BOXES}.tar"] = archive
    bucket.ignores_ranges, bucket.faults = True, ["cut"] * 10
    assert get(tmp_path, "boxes") == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("get_data.sh:")]
    assert len(errors) == 1
    assert "tries in a row" in errors[0]
    part = tmp_path / f"archives/{BOXES}.tar.part"
    assert part.read_bytes() == archive[: part.stat().st_size]
    assert part.stat().st_size == len(archive) * 2 // 5
    assert not part.with_suffix("").exists(), "no final name before the file is whole"

    bucket.ignores_ranges, bucket.faults, bucket.requests = False, [], []
    assert get(tmp_path, "boxes") == 0
    assert (f"{BOXES}.tar", f"bytes={len(archive) * 2 // 5 - OVERLAP}-") in bucket.requests
    assert (tmp_path / f"archives/{BOXES}.tar").read_bytes() == archive


def test_a_part_of_an_older_file_is_not_joined_to_a_newer_one(bucket, tmp_path):
    old, new = wrap(make_scene(100)), wrap({name: content[::-1] for name, content in make_scene(100).items()})
    bucket.files[f"{BOXES}.tar"] = new
    bucket.modified = formatdate(time.time() - 1000, usegmt=True)
    for length in (len(old) // 2, len(new) + 2 * OVERLAP):
        into = tmp_path / str(length)
        (into / "archives").mkdir(parents=True)
        part = into / f"archives/{BOXES}.tar.part"
        part.write_bytes(old.ljust(length, b"\0")[:length])
        os.utime(part, (time.time() - 2000,) * 2)
        assert get(into, "boxes") == 0
        assert (into / f"archives/{BOXES}.tar").read_bytes() == new


@pytest.mark.parametrize("fault", ["503", "page"])
def test_an_error_page_is_never_kept(bucket, tmp_path, capsys, fault):
    bucket.files = {f"{BOXES}.tar": wrap(make_scene()), "cams_lidars.json": b"{}"}
    for part in ("boxes", "calibration"):
        bucket.faults = [fault] * 4
        assert get(tmp_path, part) == 1
    assert read_tree(tmp_path) == {}
    message = capsys.readouterr().err
    assert ("503" in message) if fault == "503" else ("error page" in message)


def test_an_error_page_does_not_cost_what_is_here(bucket, tmp_path):
    archive = wrap(make_scene(100))
    bucket.files[f"{BOXES}.tar"] = archive
    bucket.faults = ["page"]
    part = tmp_path / f"archives/{BOXES}.tar.part"
    part.parent.mkdir()
    part.write_bytes(archive[:-10])
    bucket.modified = formatdate(time.time() + 1000, usegmt=True)
    assert get(tmp_path, "boxes") == 1
    assert part.read_bytes() == archive[: len(archive) - 10 - OVERLAP]


def test_one_refusal_is_survived(bucket, tmp_path):
    bucket.files[f"{BOXES}.tar"] = wrap(make_scene())
    bucket.faults = ["503", "503", "503"]
    assert get(tmp_path, "boxes") == 0


def test_the_list_of_the_server_is_believed(bucket, tmp_path, capsys):
    archive = wrap(make_scene())
    bucket.files = {f"{BOXES}.tar": archive, "Checksums.txt": b"0" * 32 + f"  {BOXES}.tar\n".encode()}
    assert get(tmp_path, "boxes") == 1
    assert "md5" in capsys.readouterr().err
    assert not list(tmp_path.rglob(f"{BOXES}*"))

    bucket.files["Checksums.txt"] = f"{hashlib.md5(archive).hexdigest()} *./{BOXES}.tar\n".encode()
    (tmp_path / "archives/checksums_archives.txt").unlink(missing_ok=True)
    assert get(tmp_path, "boxes") == 0
    record = json.loads((tmp_path / "archives/checksums.json").read_text())[f"{BOXES}.tar"]
    assert record == {"size": len(archive), "sha256": hashlib.sha256(archive).hexdigest()}


def test_what_arrives_later_must_equal_what_arrived_first(bucket, tmp_path, capsys):
    bucket.files[f"{BOXES}.tar"] = wrap(make_scene())
    assert get(tmp_path, "boxes", "--delete-archives") == 0
    shutil.rmtree(tmp_path / BOXES)
    other = {name: content[::-1] for name, content in make_scene().items()}
    bucket.files[f"{BOXES}.tar"] = wrap(other)
    assert get(tmp_path, "boxes") == 1
    assert "arrived first" in capsys.readouterr().err
    assert not (tmp_path / BOXES).exists()

    (tmp_path / "archives/checksums.json").unlink()
    assert get(tmp_path, "boxes") == 0
    assert read_tree(tmp_path / BOXES) == other


def test_verify_finds_a_flipped_bit_a_missing_and_a_short_file(bucket, tmp_path, capsys):
    bucket.files[f"{BOXES}.tar"] = wrap(make_scene())
    assert get(tmp_path, "boxes") == 0
    archive, image = tmp_path / f"archives/{BOXES}.tar", next((tmp_path / BOXES).rglob("*.png"))
    whole, content = archive.read_bytes(), image.read_bytes()

    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    archive.write_bytes(flipped)
    assert get(tmp_path, "--verify") == 1
    assert "has changed" in capsys.readouterr().out
    archive.write_bytes(whole)
    assert get(tmp_path, "--verify") == 0

    image.write_bytes(content[:-1])
    assert get(tmp_path, "--verify") == 1
    image.unlink()
    assert get(tmp_path, "--verify") == 1
    (tmp_path / BOXES / MARKER).unlink()
    assert get(tmp_path, "--verify") == 1
    assert get(tmp_path, "boxes") == 0
    assert image.read_bytes() == content
    assert get(tmp_path, "--verify") == 0
    assert get(tmp_path, "--verify", "bus") == 1


def make_link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def make_negative(name: str) -> tarfile.TarInfo:
    """A member whose size leads back to its own header: older tarfile modules read it in an endless loop."""
    member = tarfile.TarInfo(name)
    member.size = -BLOCK
    return member


HOSTILE = {
    "parent": {"../escaped.png": b"x"},
    "hidden parent": {f"{BOXES}/{SCENE}/../../../escaped.png": b"x"},
    "absolute": {"/tmp/escaped_from_the_download_test.png": b"x"},
    "backslash": {f"{BOXES}/..\\escaped.png": b"x"},
    "control": {f"{BOXES}/a\nb.png": b"x"},
    "symlink": {"link": make_link(f"{BOXES}/{SCENE}/link", "/tmp", tarfile.SYMTYPE)},
    "hard link": {"link": make_link(f"{BOXES}/{SCENE}/link", "/etc/passwd", tarfile.LNKTYPE)},
    "device": {"device": make_link(f"{BOXES}/{SCENE}/null", "", tarfile.CHRTYPE)},
    "pipe": {"pipe": make_link(f"{BOXES}/{SCENE}/pipe", "", tarfile.FIFOTYPE)},
    "negative size": {"negative": make_negative(f"{BOXES}/{SCENE}/negative.png")},
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_member_stops_the_unpacking_before_anything_is_written(bucket, tmp_path, capsys, case):
    good = {f"{BOXES}/{name}": content for name, content in make_scene().items()}
    bucket.files[f"{BOXES}.tar"] = make_tar({**good, **HOSTILE[case]})
    into = tmp_path / "deep/Datasets"
    assert get(into, "boxes") == 1
    assert not (into / BOXES).exists()
    assert {path.name for path in tmp_path.rglob("*") if path.is_file()} == {f"{BOXES}.tar", "checksums.json"}
    assert not Path("/tmp/escaped_from_the_download_test.png").exists()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_archive_that_is_not_a2d2_is_refused(bucket, tmp_path, capsys):
    bucket.files[f"{BOXES}.tar"] = make_tar({"somewhere/else.png": b"x"})
    assert get(tmp_path, "boxes") == 1
    assert "scene" in capsys.readouterr().err
    assert not (tmp_path / BOXES).exists()


def test_an_archive_cut_at_any_block_is_refused(tmp_path):
    archive = wrap(make_scene(2, 700))
    path = tmp_path / "boxes.tar"
    # The zeros at the end fill a record; the archive is complete with the first block of them.
    end = len(archive.rstrip(b"\0"))
    for length in range(0, end, 256):
        path.write_bytes(archive[:length])
        with pytest.raises(DownloadError):
            list_members(path, BOXES)
    path.write_bytes(archive)
    assert len(list_members(path, BOXES)) == 3


def test_a_broken_header_in_the_middle_is_not_taken_for_the_end(tmp_path):
    archive = bytearray(wrap(make_scene(3, 700)))
    path = tmp_path / "boxes.tar"
    path.write_bytes(archive)
    second = list_members(path, BOXES)[1]
    archive[second.offset - BLOCK] ^= 1
    path.write_bytes(archive)
    with pytest.raises(DownloadError, match="broken"):
        list_members(path, BOXES)


def test_too_little_space_is_said_before_anything_is_fetched_or_unpacked(bucket, tmp_path, capsys, monkeypatch):
    archive = wrap(make_scene())
    bucket.files[f"{BOXES}.tar"] = archive
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=len(archive)))
    assert get(tmp_path, "boxes") == 1
    message = capsys.readouterr().err
    assert format_bytes(2 * len(archive)) in message
    assert format_bytes(len(archive)) in message
    assert read_tree(tmp_path) == {}

    (tmp_path / f"archives/{BOXES}.tar").write_bytes(archive)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert get(tmp_path, "boxes") == 1
    assert "1.0 kB are free" in capsys.readouterr().err
    assert read_tree(tmp_path / BOXES) == {}


def test_a_full_disk_ends_in_one_line_and_the_rerun_finishes(bucket, tmp_path, capsys, monkeypatch):
    bucket.files[f"{BOXES}.tar"] = wrap(make_scene())

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(archives, "write_member", fail)
        assert get(tmp_path, "boxes") == 1
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert get(tmp_path, "boxes") == 0
    assert read_tree(tmp_path / BOXES) == make_scene()


def test_objects_fill_the_same_tree_where_there_is_no_archive(bucket, tmp_path, capsys):
    boxes, bus = make_scene(11), {f"{SCENE}/bus/20180807145028_bus_signals.json": b"[]", "empty.txt": b""}
    bucket.files = {f"{BOXES}/{name}": content for name, content in boxes.items()}
    bucket.files |= {f"{BUS}/{name}": content for name, content in bus.items()} | {"cams_lidars.json": b"{}"}
    lines = [f"{hashlib.md5(content).hexdigest()}  {name}" for name, content in bucket.files.items()]
    bucket.files["CHECKSUMS.txt"] = "\n".join(lines).encode()
    bucket.faults = ["cut", "503", "cut"]
    assert get(tmp_path) == 0
    assert "single objects" in capsys.readouterr().err
    assert read_tree(tmp_path / BOXES) == boxes
    assert read_tree(tmp_path / BUS) == bus
    assert not find_leftovers(tmp_path)
    assert get(tmp_path, "--verify") == 0


def test_a_sync_that_was_interrupted_fetches_only_what_is_missing(bucket, tmp_path):
    boxes = make_scene(11)
    bucket.files = {f"{BOXES}/{name}": content for name, content in boxes.items()}
    broken = f"{BOXES}/{list(boxes)[10]}"
    content, bucket.files["CHECKSUMS.txt"] = bucket.files[broken], b"0" * 32 + f"  {broken}".encode()
    assert get(tmp_path, "boxes") == 1
    arrived = set(read_tree(tmp_path / BOXES))
    assert list(boxes)[10] not in arrived
    assert not (tmp_path / BOXES / MARKER).exists()

    (tmp_path / "archives/checksums_objects.txt").write_text(f"{hashlib.md5(content).hexdigest()}  {broken}")
    bucket.requests = []
    assert get(tmp_path, "boxes") == 0
    assert {path for path, _ in bucket.requests}.isdisjoint(f"{BOXES}/{name}" for name in arrived)
    assert read_tree(tmp_path / BOXES) == boxes


def test_a_key_that_leads_elsewhere_stops_the_sync(bucket, tmp_path):
    bucket.files = {f"{BOXES}/{SCENE}/good.png": b"x", f"{BOXES}/../escaped.png": b"x"}
    assert get(tmp_path, "boxes") == 1
    assert read_tree(tmp_path) == {}


def test_a_part_that_is_nowhere_is_named_with_both_places(bucket, tmp_path, capsys):
    assert get(tmp_path, "boxes") == 1
    message = capsys.readouterr().err
    assert "404" in message
    assert "A2D2_OBJECTS_URL" in message
    assert get(tmp_path, "calibration") == 1


def test_the_calibration_of_the_boxes_set_serves_where_there_is_no_other(bucket, tmp_path):
    bucket.files[f"{BOXES}.tar"] = wrap({**make_scene(), "cams_lidars.json": b'{"vehicle": {}}'})
    assert get(tmp_path, "boxes", "calibration") == 0
    assert (tmp_path / "cams_lidars.json").read_bytes() == b'{"vehicle": {}}'


def test_two_runs_at_once_do_not_write_the_same_folder(bucket, tmp_path, capsys):
    bucket.files["cams_lidars.json"] = b"{}"
    (tmp_path / "archives").mkdir()
    lock = lock_folder(tmp_path / "archives")
    assert get(tmp_path, "calibration") == 1
    assert "another get_data.sh" in capsys.readouterr().err
    os.close(lock)
    assert get(tmp_path, "calibration") == 0


def test_wrong_use_ends_with_2_and_a_suggestion(tmp_path, capsys, monkeypatch):
    for arguments in (["bokses"], ["--verify", "--delete-archives"], ["--no-such-option"]):
        with pytest.raises(SystemExit) as exit_info:
            get(tmp_path, *arguments)
        assert exit_info.value.code == 2
    assert "did you mean 'boxes'" in capsys.readouterr().err
    monkeypatch.setenv("A2D2_URL", "somewhere/else")
    with pytest.raises(SystemExit) as exit_info:
        get(tmp_path, "boxes")
    assert exit_info.value.code == 2
    assert read_tree(tmp_path) == {}


def start_script(into: Path, *arguments: str) -> subprocess.Popen:
    """`sh get_data.sh`, from another folder than the repository."""
    command = ["sh", str(ROOT / "get_data.sh"), *arguments, "--into", into.name]
    return subprocess.Popen(command, cwd=into.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def heeded_interrupts():
    """Programs that a test starts receive SIGINT, even if the tests run in the background, where it is ignored."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("heeded_interrupts")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_download_that_is_killed_goes_on_where_it_was(bucket, tmp_path, number):
    archive = wrap(make_scene(100))
    bucket.files[f"{BOXES}.tar"] = archive
    bucket.faults = ["stall"]
    part = tmp_path / f"archives/{BOXES}.tar.part"
    with start_script(tmp_path, "boxes") as run:
        deadline = time.monotonic() + 15
        while not (part.exists() and part.stat().st_size > 3 * OVERLAP):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        run.send_signal(number)
        _, message = run.communicate(timeout=15)
    assert run.returncode == (-number if number == signal.SIGKILL else 75)
    assert "Traceback" not in message
    assert not (tmp_path / BOXES).exists()

    bucket.requests = []
    with start_script(tmp_path, "boxes") as run:
        _, message = run.communicate(timeout=15)
    assert run.returncode == 0, message
    assert int(dict(bucket.requests)[f"{BOXES}.tar"][6:-1]) > 2 * OVERLAP
    assert (tmp_path / f"archives/{BOXES}.tar").read_bytes() == archive
    assert read_tree(tmp_path / BOXES) == make_scene(100)


KILL_AT = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from a2d2.download.__main__ import main
from a2d2.download.progress import Progress
calls, limit = 0, int(sys.argv[2])
def count(function):
    def counted(*arguments):
        global calls
        calls += 1
        if calls == limit:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments)
    return counted
Progress.add = count(Progress.add)
Path.replace = count(Path.replace)
sys.exit(main(sys.argv[3:]))
"""


def test_an_unpacking_killed_at_any_step_ends_with_the_tree_of_a_clean_run(bucket, tmp_path):
    bucket.files[f"{BOXES}.tar"] = wrap(make_scene(8))
    (tmp_path / "archives").mkdir()
    (tmp_path / f"archives/{BOXES}.tar").write_bytes(bucket.files[f"{BOXES}.tar"])
    codes, source = [], random.Random(0)
    # A run is killed at its second step or later, so each run completes at least one step.
    while 0 not in codes:
        limit = source.randint(2, 6)
        command = [sys.executable, "-c", KILL_AT, str(ROOT), str(limit), "boxes", "--into", str(tmp_path)]
        codes.append(subprocess.run(command, capture_output=True).returncode)
        assert len(codes) < 40
    assert codes.count(-signal.SIGKILL) >= 3
    assert set(codes) == {-signal.SIGKILL, 0}
    assert read_tree(tmp_path / BOXES) == make_scene(8)
    assert not find_leftovers(tmp_path / BOXES)
    assert get(tmp_path, "--verify") == 0


def test_the_module_needs_nothing_but_the_standard_library():
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import a2d2.download.__main__; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=True)
    outside = {name.split(".")[0] for name in loaded.stdout.split()} - set(sys.stdlib_module_names)
    assert outside <= {"a2d2", "__main__"}
