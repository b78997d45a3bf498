"""Anyone's pictures and labels -> a preprocessed dataset (docs/own-data.md).

    python preprocessing/import_data.py --images DIR --masks DIR --classes classes.yaml --out Datasets/mine/320x227
    python preprocessing/import_data.py --images DIR --boxes coco.json --angles angles.csv --out Datasets/mine/320x227

The same command goes on where it was stopped, and takes in what has come since.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from _common import (
    DONE,
    ERROR,
    FORMAT_VERSION,
    PARTLY_FAILED,
    STOPPED,
    WRONG_USE,
    StopRunError,
    parse_size,
    parse_threads,
    stop_on_termination,
)
from tqdm import tqdm

from a2d2.console import allow_any_text
from a2d2.derive import STOPPING_ERRORS
from a2d2.frames import NO_SCENES, list_frames, listing_path, report_path
from a2d2.images import lock_folder, read_json, sweep_temporary, write_json
from a2d2.imported import (
    VIEW,
    ClassList,
    Imported,
    ImportFilesError,
    Job,
    Target,
    find_common_size,
    import_picture,
    list_files,
    list_kinds,
    name_scenes,
    number_pictures,
    read_angles,
    read_class_list,
    read_coco,
)
from a2d2.predictions import PICTURES
from preprocessing import _pool

MASKS = frozenset((".png", ".bmp", ".tif", ".tiff", ".gif"))  # formats that keep every value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--images", required=True, type=Path, metavar="DIR", help="folder of pictures, with its folders"
    )
    parser.add_argument("--masks", type=Path, metavar="DIR", help="folder of segmentation masks, ids or colours")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="YAML file with the classes of the masks")
    parser.add_argument("--boxes", type=Path, metavar="FILE", help="boxes, a JSON file in COCO's format")
    parser.add_argument(
        "--annotated-classes", nargs="+", metavar="NAME",
        help="of the classes of the boxes those whose every object has one (default: all)",
    )  # fmt: skip
    parser.add_argument("--depth", type=Path, metavar="DIR", help="folder of 16-bit PNG, metres x 256, 0 for unknown")
    parser.add_argument("--angles", type=Path, metavar="FILE", help="CSV file with the columns picture and angle_deg")
    parser.add_argument("--out", required=True, type=Path, metavar="ROOT", help="folder of the preprocessed dataset")
    parser.add_argument(
        "--group-by", default="folder", metavar="folder|REGEX",
        help="what a scene is: the pictures of one folder, or those whose relative paths begin with the same match",
    )  # fmt: skip
    parser.add_argument("--size", type=parse_size, metavar="WxH", help="of all files (default: the commonest)")
    parser.add_argument("--format", choices=["jpg", "png"], default="jpg", help="of the pictures (default: jpg)")
    parser.add_argument("--threads", type=parse_threads, default=4, help="worker processes (default: 4)")
    parser.add_argument("--overwrite", action="store_true", help="import finished pictures again")
    parser.add_argument("--strict", action="store_true", help="exit code 1 instead of 3 if a picture fails")
    return parser


def gather_jobs(arguments: argparse.Namespace) -> tuple[list[Job], Target, dict]:
    """What is to be done, how, and what dataset.json says of each kind of file."""
    if (arguments.masks is None) != (arguments.classes is None):
        raise StopRunError("--masks and --classes go together: name both", WRONG_USE)
    if arguments.out.resolve() in (arguments.images.resolve(), *arguments.images.resolve().parents):
        raise StopRunError(f"--out {arguments.out} holds the pictures; name another folder", WRONG_USE)
    pictures = list_files(arguments.images, PICTURES)
    if not pictures:
        raise StopRunError(f"no pictures in {arguments.images}")
    classes = read_class_list(arguments.classes) if arguments.classes else None
    masks = match_files("--masks", arguments.masks, MASKS, pictures)
    depth = match_files("--depth", arguments.depth, frozenset((".png",)), pictures)
    coco = read_coco(arguments.boxes, pictures) if arguments.boxes else None
    angles = read_angles(arguments.angles, pictures) if arguments.angles else {}
    scenes = name_scenes(pictures, arguments.group_by)
    size = arguments.size or find_common_size(pictures.values())
    target = Target(size, classes, "image" if arguments.format == "jpg" else "image_lossless")
    frames = number_pictures(scenes, read_listed(arguments.out), arguments.out)
    jobs = [
        Job(
            key, frames[key], path, masks.get(key), depth.get(key),
            None if coco is None or key not in coco.of_key else tuple(coco.of_key[key]),
            None if coco is None else coco.size.get(key), angles.get(key),
        )
        for key, path in pictures.items()
    ]  # fmt: skip
    kinds: dict[str, dict] = {"camera": {"format": arguments.format}}
    if classes is not None:
        kinds["segmentation"] = describe_classes(classes)
    if arguments.depth:
        kinds["depth"] = {}
    if coco is not None:
        kinds["boxes"] = {"classes": list(coco.names)}
        if arguments.annotated_classes is not None:
            if unknown := [name for name in arguments.annotated_classes if name not in coco.names]:
                raise StopRunError(
                    f"--annotated-classes {unknown[0]}: the classes of {arguments.boxes} are {', '.join(coco.names)}",
                    WRONG_USE,
                )
            kinds["boxes"] |= {"annotated_classes": sorted(set(arguments.annotated_classes), key=coco.names.index)}
    elif arguments.annotated_classes is not None:
        raise StopRunError("--annotated-classes is about --boxes: name these, too", WRONG_USE)
    if arguments.angles:
        kinds["steering"] = {}
    return jobs, target, kinds


def describe_classes(classes: ClassList) -> dict:
    colours = {} if classes.colours is None else {"colours": [list(colour) for colour in classes.colours]}
    return {"classes": list(classes.names)} | colours


def match_files(option: str, folder: Path | None, endings: frozenset, pictures: dict[str, Path]) -> dict[str, Path]:
    """Those of a folder's files that belong to a picture; what belongs to none is said, and StopRunError if all do."""
    if folder is None:
        return {}
    found = list_files(folder, endings)
    fitting = {key: path for key, path in found.items() if key in pictures}
    if not fitting:
        shown = next(iter(found), "nothing")
        raise StopRunError(
            f"{option} {folder}: none of its {len(found)} files has the name of a picture; it has {shown!r}, the "
            f"pictures are called {next(iter(pictures))!r} (without _image, _label or _depth at the end)"
        )
    if len(found) > len(fitting):
        other = next(path for key, path in found.items() if key not in pictures)
        print(f"{option}: {len(found) - len(fitting)} files belong to no picture, such as {other}")
    return fitting


def read_listed(out: Path) -> dict[str, str]:
    try:
        content = read_json(listing_path(out))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StopRunError(
            f"{listing_path(out)} is damaged ({error}): put it back, or import into another folder"
        ) from error
    return content


def write_dataset_json(out: Path, size: tuple[int, int], kinds: dict, overwrite: bool) -> None:
    """StopRunError if the folder holds a dataset of another size, or labels of other classes."""
    out.mkdir(parents=True, exist_ok=True)
    path = out / "dataset.json"
    wanted = {"format": FORMAT_VERSION, "size": list(size), "cameras": {}}
    with lock_folder(out):
        try:
            found = read_json(path)
        except FileNotFoundError:
            found = {}
            if any(entry.name not in (*NO_SCENES, listing_path(out).name) for entry in out.iterdir()):
                raise StopRunError(f"--out {out} is not empty, and no preprocessed dataset; name another") from None
        except ValueError as error:
            raise StopRunError(f"{path} is no JSON file ({error}); import into another folder") from error
        sections = found.pop("kinds", {})
        if found and found != wanted:
            values = next(
                f"{key} is {found.get(key)}, now {wanted[key]}" for key in wanted if found.get(key) != wanted[key]
            )
            raise StopRunError(f"{out} holds another dataset: {values}; import into another folder")
        for kind, about in kinds.items():
            if kind in sections and sections[kind] != about and not overwrite:
                raise StopRunError(
                    f"{out} holds {kind} made with {sections[kind]}, now {about}. To make them again, use --overwrite"
                )
        if found | {"kinds": sections} != wanted | {"kinds": sections | kinds}:
            write_json(path, wanted | {"kinds": sections | kinds})


def run(arguments: argparse.Namespace) -> int:
    jobs, target, kinds = gather_jobs(arguments)
    out = arguments.out
    write_dataset_json(out, target.size, kinds, arguments.overwrite)
    sweep_temporary(out)
    write_json(listing_path(out), read_listed(out) | {str(job.frame): job.key for job in jobs})
    there = {
        kind: set(list_frames(out, kind, (VIEW,), empty=False))
        for kind in (target.image_kind, *kinds)
        if kind != "camera"
    }
    left = [
        job for job in jobs
        if arguments.overwrite or not all(job.frame in there[kind] for kind in list_kinds(job, target))
    ]  # fmt: skip
    results: list[Imported] = []
    try:
        with tqdm(total=len(left), desc="import", unit="picture") as bar:
            for job, result in _pool.map_units(
                partial(import_picture, target=target), left, min(arguments.threads, len(left))
            ):
                if isinstance(result, OSError) and result.errno in STOPPING_ERRORS:
                    raise StopRunError(
                        f"{result.filename}: {result.strerror}; make room and run the same command again"
                    )
                results.append(Imported(job, f"{result}") if isinstance(result, Exception) else result)
                bar.set_postfix(failed=sum(bool(each.reason) for each in results), refresh=False)
                bar.update()
    finally:
        write_report(out, results, len(jobs) - len(left))
    failed = [each for each in results if each.reason]
    labels = ", ".join(
        f"{kind} {sum(kind in list_kinds(job, target) for job in jobs)}" for kind in kinds if kind != "camera"
    )
    scenes = len({job.frame.scene for job in jobs})
    print(f"{len(jobs)} pictures in {scenes} scenes at {target.size[0]}x{target.size[1]}; labels: {labels or 'none'}")
    counted: dict[str, int] = {}
    for each in results:
        for what, number in each.counts.items():
            counted[what] = counted.get(what, 0) + number
    for what, number in sorted(counted.items(), key=lambda item: -item[1])[:5]:
        print(f"{number} {what} are in no class" if what.startswith("pixels") else f"{number} {what}")
    path = report_path(out, "import", (1, 1))
    done = len(results) - len(failed)
    print(f"import: {done} done, {len(jobs) - len(left)} skipped, {len(failed)} failed; report in {path}")
    if failed:
        print(f"first failure: {failed[0].reason}", file=sys.stderr)
        return ERROR if arguments.strict else PARTLY_FAILED
    return DONE


def write_report(out: Path, results: list[Imported], skipped: int) -> None:
    failed = sorted((str(each.job.frame), each.job.key, each.reason) for each in results if each.reason)
    noticed = sorted((str(each.job.frame), each.job.key, each.counts) for each in results if each.counts)
    write_json(
        report_path(out, "import", (1, 1)),
        {
            "done": len(results) - len(failed),
            "skipped": skipped,
            "failed": [{"frame": frame, "picture": key, "reason": reason} for frame, key, reason in failed],
            "noticed": [{"frame": frame, "picture": key, **counts} for frame, key, counts in noticed],
        },
    )


def main() -> None:
    allow_any_text()
    stop_on_termination()
    arguments = build_parser().parse_args()
    try:
        code = run(arguments)
    except StopRunError as stop:
        print(f"import: {stop}", file=sys.stderr)
        code = stop.code
    except KeyboardInterrupt:
        print("import: stopped; the same command goes on", file=sys.stderr)
        code = STOPPED
    except (OSError, ImportFilesError) as error:
        print(f"import: {error}", file=sys.stderr)
        code = ERROR
    sys.exit(code)


if __name__ == "__main__":
    main()
