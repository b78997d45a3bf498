"""Checks whether the raw files are as this project assumes; writes a table, a JSON and plots of their content.

    python preprocessing/check.py --data Datasets/camera_lidar_semantic_bboxes --threads 4

Writes <out>/<name of the raw dataset>/check.json and PNGs of the distributions of classes, depths, boxes and angles; by
default <out> is processed/check/ beside the raw dataset. Exit code 1 if an assumption that training depends on fails.
"""

import argparse
import signal
import sys
from pathlib import Path

from _common import DONE, ERROR, STOPPED, WRONG_USE, StopRunError, parse_threads
from tqdm import tqdm

from a2d2.checks.raw_set import bind_reader, mark_damaged, open_set
from a2d2.checks.report import build_report
from a2d2.console import allow_any_text
from a2d2.frames import list_scenes
from a2d2.images import write_json
from preprocessing._pool import map_units


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    default = Path("Datasets/camera_lidar_semantic_bboxes")
    parser.add_argument("--data", type=Path, nargs="+", default=[default], help=f"raw datasets (default: {default})")
    parser.add_argument("--bus", type=Path, help="folder with the bus signals (default: found beside each raw dataset)")
    parser.add_argument(
        "--calibration", type=Path, help="cams_lidars.json (default: found in or beside each raw dataset)"
    )
    parser.add_argument(
        "--out", type=Path, help="folder of reports (default: processed/check/ beside each raw dataset)"
    )
    parser.add_argument("--threads", type=parse_threads, default=4, help="worker processes (default: 4)")
    parser.add_argument("--sample", type=int, default=1, metavar="N", help="read only each N-th frame")
    parser.add_argument(
        "--decode", action="store_true", help="decode camera pictures too, which finds damage inside them"
    )
    return parser


def check_root(root: Path, out: Path, arguments: argparse.Namespace) -> bool:
    """Check one raw dataset, print and write its report; return whether the dataset may be used for training."""
    raw = open_set(root, arguments.calibration, arguments.bus, arguments.sample)
    units, facts = raw.list_units(), []
    with tqdm(total=len(units), desc=f"check {root.resolve().name}", unit="frame") as bar:
        for unit, result in map_units(bind_reader(raw, arguments.decode), units, min(arguments.threads, len(units))):
            facts.append(mark_damaged(unit, str(result)) if isinstance(result, Exception) else result)
            bar.update()
    report = build_report(raw, facts)
    print(report.format())
    write_json(out / "check.json", report.describe())
    from a2d2.checks.plots import write_plots  # late, because importing matplotlib is slow

    write_plots(out, report)
    print(f"\ncheck: {report.summarise()}; report and plots in {out}\n")
    return not report.list_failed()


def name_folders(roots: list[Path], out: Path | None) -> dict[Path, Path]:
    """Raw dataset -> folder of its report.

    StopRunError if a folder is no raw dataset, or if two reports would have the same folder.
    """
    folders: dict[Path, Path] = {}
    for root in roots:
        if not root.is_dir():
            raise StopRunError(
                f"no folder {root}; fetch the data with `sh get_data.sh`, or name another folder with --data"
            )
        if not list_scenes(root):
            raise StopRunError(f"{root} contains no scenes (folders such as 20180807_145028); is it the raw dataset?")
        path = root.resolve()
        folder = (out or path.parent / "processed" / "check") / path.name
        if folder in folders.values():
            raise StopRunError(f"two raw datasets would write to {folder}; check them one after the other", WRONG_USE)
        folders[root] = folder
    return folders


def main() -> int:
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    allow_any_text()
    parser = build_parser()
    arguments = parser.parse_args()
    if arguments.sample < 1:
        parser.error(f"argument --sample: {arguments.sample}: must be 1 or more")
    try:
        folders = name_folders(arguments.data, arguments.out)
        if arguments.bus and not arguments.bus.is_dir():
            raise StopRunError(f"no folder {arguments.bus}; name one that contains <scene>/bus/, or leave out --bus")
        trusted = [check_root(root, folder, arguments) for root, folder in folders.items()]
    except StopRunError as stop:
        print(f"check: {stop}", file=sys.stderr)
        return stop.code
    except KeyboardInterrupt:
        print("check: stopped; no results are kept, so the same command starts from the beginning", file=sys.stderr)
        return STOPPED
    except (OSError, ValueError) as error:
        print(f"check: {error}", file=sys.stderr)
        return ERROR
    return DONE if all(trusted) else ERROR


if __name__ == "__main__":
    sys.exit(main())
