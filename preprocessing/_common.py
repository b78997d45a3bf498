"""Code that the preprocessing scripts share: import path, options, the run of the workers, report, exit code."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that a script runs from any folder, uninstalled

import argparse
import contextlib
import json
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

from tqdm import tqdm

from a2d2.calibration import Camera, load_calibration
from a2d2.console import allow_any_text, parse_shard
from a2d2.derive import STOPPING_ERRORS, Outcome, Recipe
from a2d2.frames import VIEWS, Frame, anchor, find_bus_root, find_calibration, list_frames, list_scenes, report_path
from a2d2.images import lock_folder, read_json, sweep_temporary, write_json
from preprocessing import _cluster, _pool

FORMAT_VERSION = 1
DONE, ERROR, WRONG_USE, PARTLY_FAILED, STOPPED = 0, 1, 2, 3, 75


class StopRunError(Exception):
    """Ends a script with a message of one line; `code` is the exit code."""

    def __init__(self, message: str, code: int = ERROR):
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Kind:
    """The kind of derived file that a script writes.

    `name`: name of the kind in dataset.json and of its report; `raw`: the kind of raw file it reads; `produces`: the
    kind of derived file that exists once a frame is finished; `derive`: a function of a2d2.derive, for one frame or,
    with `by_scene`, for all frames of a scene; `options`: those of the kind, equal for all its files; `prepare`: called
    with all frames, the output folder and `--overwrite` before the frames are derived.
    """

    name: str
    raw: str
    produces: str
    derive: Callable
    options: dict = field(default_factory=dict)
    by_scene: bool = False
    prepare: Callable | None = None


def parse_size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write WIDTHxHEIGHT, such as 1024x640") from None
    if width < 1 or height < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: width and height must be 1 or more")
    return width, height


def parse_threads(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of processes, 1 or more")
    return int(text)


def build_parser(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all scripts have."""
    parser = argparse.ArgumentParser(
        description=description.partition("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("Datasets/camera_lidar_semantic_bboxes"),
        help="raw dataset: the folder of the scenes",
    )
    parser.add_argument("--bus", type=Path, help="folder with the bus signals (default: found beside the raw dataset)")
    parser.add_argument(
        "--calibration", type=Path, help="cams_lidars.json (default: found in or beside the raw dataset)"
    )
    parser.add_argument(
        "--out", type=Path, help="preprocessed dataset (default: processed/<size>/ beside the raw dataset)"
    )
    parser.add_argument("--size", type=parse_size, default="1024x640", help="size of all derived files")
    parser.add_argument("--view", choices=[*VIEWS, "all"], default="front_center", help="camera")
    parser.add_argument("--threads", type=parse_threads, default=4, help="worker processes")
    parser.add_argument(
        "--cluster", metavar="tcp://HOST:8786", help="run on the workers of this dask.distributed scheduler"
    )
    parser.add_argument("--shard", type=parse_shard, default="1/1", help="process shard i of n, for job arrays")
    parser.add_argument(
        "--overwrite", action="store_true", help="process finished frames again, with other options too"
    )
    parser.add_argument("--strict", action="store_true", help="exit code 1 instead of 3 if a frame fails")
    return parser


def run_script(kind: Kind, arguments: argparse.Namespace) -> None:
    """Derive all frames of one kind and exit; an error of the user gives a message of one line, no traceback."""
    stop_on_termination()
    allow_any_text()
    try:
        code = _run(kind, arguments)
    except StopRunError as stop:
        print(f"{kind.name}: {stop}", file=sys.stderr)
        code = stop.code
    except KeyboardInterrupt:
        print(f"{kind.name}: stopped; the same command resumes", file=sys.stderr)
        code = STOPPED
    except (OSError, ValueError, _cluster.ClusterError) as error:
        print(f"{kind.name}: {error}", file=sys.stderr)
        code = ERROR
    sys.exit(code)


def stop_on_termination() -> None:
    """Let a signal that asks to end, as a cluster sends it, have the effect of Ctrl-C."""

    def interrupt(number, stack):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)


def _run(kind: Kind, arguments: argparse.Namespace) -> int:
    data = arguments.data
    if not data.is_dir():
        raise StopRunError(
            f"no folder {data}; fetch the data with `sh get_data.sh`, or name another folder with --data"
        )
    if not list_scenes(data):
        raise StopRunError(f"{data} contains no scenes (folders such as 20180807_145028); is it the raw dataset?")
    width, height = arguments.size
    out = arguments.out or anchor(data).parent / "processed" / f"{width}x{height}"
    if out.resolve() == data.resolve():
        raise StopRunError(f"--out {out} is the raw dataset, whose files would be replaced; name another", WRONG_USE)
    calibration = load_calibration(arguments.calibration or find_calibration(data))
    if arguments.cluster:  # workers have other working directories
        data, out = data.resolve(), out.resolve()
    views = VIEWS if arguments.view == "all" else (arguments.view,)
    frames = list_frames(data, kind.raw, views)
    if not frames:
        raise StopRunError(f"{data} has no {kind.raw} files of {', '.join(views)}")

    bus_root = arguments.bus.resolve() if arguments.bus else find_bus_root(data)
    if kind.by_scene and bus_root is None:
        raise StopRunError(
            f"no bus signals beside {data}; fetch them with `sh get_data.sh bus`, or name a folder with --bus"
        )

    cameras = {name: camera.resize(arguments.size) for name, camera in calibration.cameras.items()}
    recipe = Recipe(out, cameras, kind.options, bus_root)
    _check_dataset_json(kind, recipe, frames, arguments.overwrite)
    sweep_temporary(out)
    if kind.prepare:
        kind.prepare(frames, out, arguments.overwrite)

    # shards divide all units, not only the unfinished ones, so that two shards never overlap
    index, count = arguments.shard
    units = list(_group_units(kind, frames))[index - 1 :: count]
    total = sum(len(unit) for unit in units)
    if not arguments.overwrite:
        finished = set(list_frames(out, kind.produces, views, empty=False))
        units = [tuple(frame for frame in unit if frame not in finished) for unit in units]
    units = [unit for unit in units if unit]
    skipped = total - sum(len(unit) for unit in units)
    return _derive_units(kind, recipe, units, skipped, arguments)


def _group_units(kind: Kind, frames: list[Frame]) -> Iterator[tuple[Frame, ...]]:
    if not kind.by_scene:
        yield from ((frame,) for frame in frames)
        return
    for _, members in groupby(frames, key=lambda frame: frame.scene):
        yield tuple(members)


def describe_camera(camera: Camera) -> dict:
    """A camera as dataset.json stores it: `matrix` at the derived size, the other values as recorded."""
    return {
        "lens": camera.lens,
        "matrix": camera.matrix.tolist(),
        "original": camera.original.tolist(),
        "distortion": camera.distortion.tolist(),
        "recorded_size": list(camera.recorded_size),
        "pose": {"origin": camera.pose.origin.tolist(), "axes": camera.pose.axes.tolist()},
    }


def _add_poses(found: dict, wanted: dict) -> dict:
    """The dataset.json that was found, with the poses that earlier versions of this code did not write: nothing else
    has changed for them."""
    cameras = {
        name: camera | {"pose": wanted["cameras"].get(name, {}).get("pose")} if "pose" not in camera else camera
        for name, camera in found.get("cameras", {}).items()
    }
    return found | ({"cameras": cameras} if cameras else {})


def _check_dataset_json(kind: Kind, recipe: Recipe, frames: list[Frame], overwrite: bool) -> None:
    """Write dataset.json; StopRunError if it exists with another size, calibration or other options of this kind."""
    recipe.out.mkdir(parents=True, exist_ok=True)
    path = recipe.out / "dataset.json"
    cameras = recipe.cameras
    wanted = {
        "format": FORMAT_VERSION,
        "size": list(next(iter(cameras.values())).size),
        "cameras": {name: describe_camera(camera) for name, camera in cameras.items()},
    }
    with lock_folder(recipe.out):  # five scripts may start at once, and each adds its kind
        before = _read_dataset_json(path)
        found = _add_poses(before, wanted)
        sections = dict(found.pop("kinds", {}))
        differing = [key for key in wanted if found and found.get(key) != wanted[key]]
        others = sorted(set(sections) - {kind.name})
        if differing and (others or not overwrite):
            values = "; ".join(_show_difference(key, found.get(key), wanted[key]) for key in differing)
            advice = f"choose another --out: it also contains {', '.join(others)}" if others else "use --overwrite"
            raise StopRunError(f"{recipe.out} was made with other settings: {values}. To make it again, {advice}")
        options = sections.get(kind.name, kind.options)
        if options != kind.options and not overwrite:
            raise StopRunError(
                f"{recipe.out} contains {kind.name} made with {json.dumps(options)}, this run has "
                f"{json.dumps(kind.options)}. To make it again, use --overwrite"
            )
        if differing or options != kind.options:
            _remove_finished(kind, recipe.out)  # else an interrupted run would leave a mixture of old and new files
        sections[kind.name] = kind.options
        if before != wanted | {"kinds": sections}:
            write_json(path, wanted | {"kinds": sections})


def _read_dataset_json(path: Path) -> dict:
    try:
        return read_json(path)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StopRunError(
            f"{path} is no JSON file ({error}); delete the folder {path.parent} and start again"
        ) from error


def _show_difference(key: str, found: object, wanted: object) -> str:
    if isinstance(found, dict) and isinstance(wanted, dict):
        inner = next(name for name in [*found, *wanted] if found.get(name) != wanted.get(name))
        return _show_difference(f"{key}.{inner}", found.get(inner), wanted.get(inner))
    return f"{key} is {json.dumps(found)} in dataset.json and {json.dumps(wanted)} in this run"


def _remove_finished(kind: Kind, out: Path) -> None:
    for produced in list_frames(out, kind.produces):
        produced.path(kind.produces).unlink(missing_ok=True)


def _derive_unit(unit: tuple[Frame, ...], kind: Kind, recipe: Recipe) -> list[Outcome]:
    """Derive the frames of a unit and return their outcomes; runs on a worker."""
    if kind.by_scene:
        return kind.derive(list(unit), recipe)
    return [kind.derive(frame, recipe) for frame in unit]


def _map_units(work: Callable, units: list, arguments: argparse.Namespace) -> Iterator[tuple[object, object]]:
    if arguments.cluster and units:
        return _cluster.map_units(work, units, arguments.cluster)
    return _pool.map_units(work, units, min(arguments.threads, len(units)))


def _derive_units(kind: Kind, recipe: Recipe, units: list, skipped: int, arguments: argparse.Namespace) -> int:
    outcomes: list[Outcome] = []
    try:
        with tqdm(total=sum(map(len, units)), desc=kind.name, unit="frame") as bar:
            work = partial(_derive_unit, kind=kind, recipe=recipe)
            for unit, result in _map_units(work, units, arguments):
                if isinstance(result, OSError) and result.errno in STOPPING_ERRORS:
                    raise StopRunError(
                        f"{result.filename}: {result.strerror}; make room and run the same command again"
                    )
                if isinstance(result, Exception):
                    result = [Outcome(frame, "failed", f"{result}") for frame in unit]
                outcomes += result
                bar.set_postfix(failed=sum(outcome.status == "failed" for outcome in outcomes), refresh=False)
                bar.update(len(unit))
    except BaseException:
        with contextlib.suppress(OSError):  # writing the report may fail too, on a full disk; raise the first error
            _write_report(kind, recipe.out, outcomes, skipped, arguments)
        raise
    counts = _write_report(kind, recipe.out, outcomes, skipped, arguments)
    print(
        f"{kind.name}: {counts['done']} done, {skipped} skipped, {counts['missing']} missing input, "
        f"{counts['failed']} failed; report in {report_path(recipe.out, kind.name, arguments.shard)}"
    )
    if counts["failed"]:
        return ERROR if arguments.strict else PARTLY_FAILED
    return DONE


def _write_report(
    kind: Kind, out: Path, outcomes: list[Outcome], skipped: int, arguments: argparse.Namespace
) -> Counter:
    by_status = Counter(outcome.status for outcome in outcomes)
    report = {"done": by_status["done"], "skipped": skipped}
    for status in ("missing", "failed"):
        rows = sorted((str(outcome.frame), outcome.reason) for outcome in outcomes if outcome.status == status)
        report[status] = [{"frame": frame, "reason": reason} for frame, reason in rows]
    noticed = sorted((str(outcome.frame), outcome.counts) for outcome in outcomes if outcome.counts)
    report["noticed"] = [{"frame": frame, **counts} for frame, counts in noticed]
    write_json(report_path(out, kind.name, arguments.shard), report)
    return by_status
