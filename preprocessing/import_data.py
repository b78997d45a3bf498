"""Anyone's pictures and labels -> a preprocessed dataset (docs/own-data.md).

    python preprocessing/import_data.py --images DIR --masks DIR --classes classes.yaml --out Datasets/mine/320x227
    python preprocessing/import_data.py --images DIR --boxes coco.json --angles angles.csv --out Datasets/mine/320x227

The same command goes on where it was stopped, and takes in what has come since.
"""

import argparse
import sys
from collections.abc import Sequence
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
from a2d2.frames import (
    DERIVED_KINDS,
    NO_SCENES,
    Frame,
    list_frames,
    listing_path,
    parse_frame,
    report_path,
    sources_path,
)
from a2d2.images import lock_folder, read_json, sweep_temporary, write_json
from a2d2.imported import (
    VIEW,
    ClassList,
    Imported,
    ImportFilesError,
    Job,
    Target,
    describe_sources,
    find_common_size,
    import_picture,
    list_files,
    list_kinds,
    list_unread,
    name_scenes,
    number_pictures,
    read_angles,
    read_class_list,
    read_coco,
)
from a2d2.imported_labels import describe_labels
from a2d2.predictions import PICTURES
from preprocessing import _pool

MASKS = frozenset((".png", ".bmp", ".tif", ".tiff", ".gif"))  # formats that keep every value
IMAGES = ("image", "image_lossless")  # the kinds of file that dataset.json calls camera

Sources = dict[str, dict[str, dict]]
"""Folder of pictures -> key -> what describe_sources says of the picture at its import."""


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
    parser.add_argument(
        "--prefix", default="", metavar="NAME",
        help="what the names of scenes begin with, so that those of several datasets differ (default: nothing)",
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
    if arguments.images.resolve() in arguments.out.resolve().parents:
        raise StopRunError(
            f"--out {arguments.out} lies in --images {arguments.images}, so what is written would be read the next "
            "time; name another folder",
            WRONG_USE,
        )
    pictures = list_files(arguments.images, PICTURES)
    if not pictures:
        raise StopRunError(f"no pictures in {arguments.images}")
    classes = read_class_list(arguments.classes) if arguments.classes else None
    masks = match_files("--masks", arguments.masks, MASKS, pictures)
    depth = match_files("--depth", arguments.depth, frozenset((".png",)), pictures)
    coco = read_coco(arguments.boxes, pictures) if arguments.boxes else None
    angles, others = read_angles(arguments.angles, pictures) if arguments.angles else ({}, [])
    say_others("--angles", others)
    if coco is not None:
        say_others("--boxes", coco.others)
    before = {key: frame.split("/")[0] for frame, key in read_listed(arguments.out).items()}
    scenes = name_scenes(pictures, arguments.group_by, arguments.prefix, before)
    size = arguments.size or find_common_size(pictures.values())
    target = Target(size, classes, "image" if arguments.format == "jpg" else "image_lossless")
    frames = number_pictures(scenes, find_known(arguments.out, scenes), arguments.out)
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
    check_sources(arguments.images, jobs, read_sources(arguments.out), arguments.out, arguments.overwrite)
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
    if unread := list_unread(folder, endings):
        print(
            f"{option}: {len(unread)} files, such as {unread[0]}, are not read: taken are formats that keep every "
            f"value, which end in {' '.join(sorted(endings))}"
        )
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


def say_others(option: str, names: Sequence[str]) -> None:
    if names:
        print(f"{option}: {len(names)} names are of no picture, such as {names[0]}")


def read_listed(out: Path) -> dict[str, str]:
    """Frame -> key, from an earlier import; nothing if there was none. StopRunError for a damaged file."""
    try:
        content = read_json(listing_path(out))
        if not isinstance(content, dict) or not all(isinstance(key, str) for key in content.values()):
            raise ValueError("it does not list a picture for each frame")
        for frame in content:
            parse_frame(frame)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise StopRunError(
            f"{listing_path(out)} is damaged ({error}): put it back, or import into another folder"
        ) from error
    return content


def find_known(out: Path, scenes: dict[str, str]) -> dict[str, str]:
    """Frame -> key, of the pictures of earlier imports. One that failed, and is of another scene now, is none of them.

    StopRunError if files are there that no import has listed: their numbers would be given to other pictures.
    """
    header, listed = read_header(out), read_listed(out)
    there = {str(frame) for frames in find_files(out).values() for frame in frames}
    if header and not header.get("cameras") and (unlisted := sorted(there - listed.keys())):
        raise StopRunError(
            f"{listing_path(out)} does not say which picture {unlisted[0]} is: put the file back as it was, or import "
            "into another folder"
        )
    return {
        frame: key for frame, key in listed.items()
        if frame in there or scenes.get(key, frame.split("/")[0]) == frame.split("/")[0]
    }  # fmt: skip


def read_sources(out: Path) -> Sources:
    """Nothing if there was no import, or one of before this file was kept. StopRunError for a damaged file."""
    path = sources_path(out)
    try:
        content = read_json(path)
        if not all(isinstance(about, dict) for of_key in content.values() for about in of_key.values()):
            raise ValueError("it does not list files for each picture")
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError) as error:
        raise StopRunError(
            f"{path} is damaged ({error}): put it back, or delete it; then changes of files until now go unnoticed"
        ) from error
    return content


def read_header(out: Path) -> dict:
    """What dataset.json says, nothing for a folder that is empty or not there. StopRunError for any other folder."""
    path = out / "dataset.json"
    try:
        found = read_json(path)
    except FileNotFoundError:
        known = (*NO_SCENES, listing_path(out).name, sources_path(out).name)
        if out.is_dir() and any(entry.name not in known for entry in out.iterdir()):
            raise StopRunError(f"--out {out} is not empty, and no preprocessed dataset; name another") from None
        return {}
    except ValueError as error:
        raise StopRunError(f"{path} is no JSON file ({error}); import into another folder") from error
    kinds = found.get("kinds", {}) if isinstance(found, dict) else None
    if not isinstance(kinds, dict) or not all(isinstance(about, dict) for about in kinds.values()):
        raise StopRunError(f"{path} does not describe a preprocessed dataset; import into another folder")
    if "predictions" in found:
        raise StopRunError(f"--out {out} holds predictions, and these are no labels; name another folder")
    return found


def find_files(out: Path) -> dict[str, set[Frame]]:
    """Kind -> the frames that have a whole file of it."""
    return {kind: set(list_frames(out, kind, (VIEW,), empty=False)) for kind in DERIVED_KINDS}


def remove_files(out: Path, kind: str) -> int:
    """Remove all files of a kind, as dataset.json calls it; how many."""
    frames = [(frame, each) for each in (IMAGES if kind == "camera" else (kind,)) for frame in list_frames(out, each)]
    for frame, each in frames:
        frame.path(each).unlink(missing_ok=True)
    return len(frames)


def write_dataset_json(out: Path, size: tuple[int, int], kinds: dict, overwrite: bool) -> None:
    """StopRunError if the folder holds a dataset of another size, or labels of other classes.

    Labels of other classes that are to be overwritten are removed first: what the classes are stands in dataset.json
    alone, so those that an interruption, a failure or a missing source leaves behind would be read as the new ones.
    """
    out.mkdir(parents=True, exist_ok=True)
    wanted = {"format": FORMAT_VERSION, "size": list(size), "cameras": {}}
    with lock_folder(out):
        header = read_header(out)
        files = find_files(out)
        binds = any(files.values())  # an import in which all pictures failed does not
        found = {key: value for key, value in header.items() if key != "kinds"}
        sections = dict(header.get("kinds", {})) if binds else {}
        if binds and found != wanted:
            values = next(
                f"{key} is {found.get(key)}, now {wanted[key]}" for key in wanted if found.get(key) != wanted[key]
            )
            raise StopRunError(f"{out} holds another dataset: {values}; import into another folder")
        if "boxes" in kinds and "boxes" in sections:
            sections["boxes"] = {key: value for key, value in sections["boxes"].items() if value is not None}
            if sections["boxes"].get("classes") == kinds["boxes"]["classes"]:
                # what is not named now, and may have been added by hand, stays
                kinds = kinds | {"boxes": sections["boxes"] | kinds["boxes"]}
        filled = {"camera" if kind in IMAGES else kind for kind, frames in files.items() if frames}
        differing = [kind for kind, about in kinds.items() if kind in filled and sections.get(kind, about) != about]
        if differing and not overwrite:
            raise StopRunError(
                f"{out} holds {differing[0]} made with {sections[differing[0]]}, now {kinds[differing[0]]}. To make "
                "them again, use --overwrite"
            )
        for kind in differing:
            print(f"--overwrite: {remove_files(out, kind)} files of {kind} made with {sections[kind]} are removed")
        if header != wanted | {"kinds": sections | kinds}:
            write_json(out / "dataset.json", wanted | {"kinds": sections | kinds})


def check_sources(images: Path, jobs: list[Job], sources: Sources, out: Path, overwrite: bool) -> None:
    """StopRunError if pictures of another folder have the names of these, or the same picture has another name."""
    now = str(images.resolve())
    place = {str(Path(folder, key)): (folder, key) for folder, of_key in sources.items() for key in of_key}
    folder_of = {key: folder for folder, of_key in sources.items() if folder != now for key in of_key}
    others = []
    for job in jobs:
        folder, key = place.get(str(Path(now, job.key)), (now, job.key))
        if key != job.key:
            raise StopRunError(
                f"{job.picture} is in {out} already, as {key!r} of --images {folder}: name that folder again, or "
                "import into another"
            )
        if job.key in folder_of and sources[folder_of[job.key]][job.key].get("image") != describe_sources(job)["image"]:
            others.append(job)
    if others and not overwrite:
        first = others[0]
        raise StopRunError(
            f"{out} holds {first.key!r} of --images {folder_of[first.key]}, and {first.picture} is another file, as "
            f"are {len(others) - 1} more: import into another folder, or replace what is there with --overwrite"
        )


def update_sources(jobs: list[Job], target: Target, kinds: dict, arguments: argparse.Namespace) -> Sources:
    """Remove the files that were made of what has changed since, so that they are made again; say what has changed or
    vanished. The sources as they are now."""
    out, sources, folder = arguments.out, read_sources(arguments.out), str(arguments.images.resolve())
    there = find_files(out)
    known = {key: about for of_key in sources.values() for key, about in of_key.items()}
    recorded = {place: dict(of_key) for place, of_key in sources.items()} | {folder: dict(sources.get(folder, {}))}
    again, without, unknown, lost = [], [], [], {}
    for job in jobs:
        now, before = describe_sources(job), known.get(job.key, {})
        changed = [kind for kind in now if kind in before and before[kind] != now[kind]]
        present = [kind for kind in DERIVED_KINDS if job.frame in there[kind]]
        labels = set(list_kinds(job, target)) - {target.image_kind}
        stale = [kind for kind in present if kind in kinds and kind not in labels]
        without += [(job, kind) for kind in stale]
        doomed = set(stale) if arguments.overwrite else set()
        if "image" in changed:
            doomed |= set(present)  # a label of another picture is worse than none
            lost |= {kind: job for kind in present if kind not in IMAGES and kind not in labels}
            before = {}
        else:
            doomed |= set(changed)
        if changed and present:
            again.append(job)
        if present and not known.get(job.key):
            unknown.append(job)
        for kind in DERIVED_KINDS:  # the image first: without it there is no frame
            if kind in doomed:
                job.frame.path(kind).unlink(missing_ok=True)
        for of_key in recorded.values():
            of_key.pop(job.key, None)
        recorded[folder][job.key] = before | now
    keys = {job.key for job in jobs}
    frames = {str(frame) for found in there.values() for frame in found}
    gone = [key for frame, key in read_listed(out).items() if key not in keys and frame in frames]
    if again:
        print(f"{len(again)} pictures are imported again: their files have changed, such as {again[0].key!r}")
    for kind, job in lost.items():
        print(f"{kind} of changed pictures, such as {job.key!r}, is removed: name its source again to import it")
    if without:
        job, kind = without[0]
        end = "they are removed" if arguments.overwrite else "they stay until --overwrite"
        print(f"{len(without)} labels have no source any more, such as {kind} of {job.key!r}: {end}")
    if gone:
        print(
            f"{len(gone)} pictures of {out} are not in {arguments.images}, such as {gone[0]!r}: they stay; to leave "
            "them out, import into another folder"
        )
    if unknown and not arguments.overwrite:
        print(
            f"whether the files of {len(unknown)} pictures have changed is not known, since {sources_path(out).name} "
            "says nothing of them; --overwrite imports them again"
        )
    return {place: of_key for place, of_key in recorded.items() if of_key}


def run(arguments: argparse.Namespace) -> int:
    jobs, target, kinds = gather_jobs(arguments)
    out = arguments.out
    write_dataset_json(out, target.size, kinds, arguments.overwrite)
    sweep_temporary(out)
    frame_of = {job.key: str(job.frame) for job in jobs}
    listed = {frame: key for frame, key in read_listed(out).items() if frame_of.get(key, frame) == frame}
    write_json(listing_path(out), listed | {frame: key for key, frame in frame_of.items()})
    # files of changed sources go before the new state of these is written: a run that is killed in between must not
    # find them up to date
    write_json(sources_path(out), update_sources(jobs, target, kinds, arguments))
    there = find_files(out)
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
    lacking = {each.job.key for each in failed}
    whole = [job for job in jobs if job.key not in lacking]
    labels = ", ".join(
        f"{kind} {sum(kind in list_kinds(job, target) for job in whole)}" for kind in kinds if kind != "camera"
    )
    scenes = len({job.frame.scene for job in whole})
    print(f"{len(whole)} pictures in {scenes} scenes at {target.size[0]}x{target.size[1]}; labels: {labels or 'none'}")
    counted: dict[str, int] = {}
    for each in results:
        for what, number in each.counts.items():
            counted[what] = counted.get(what, 0) + number
    foreign = [what for what in sorted(counted, key=lambda what: -counted[what]) if what.startswith("pixels")]
    for what in foreign[:5]:
        print(f"{counted[what]} {what} are in no class")
    for what in sorted(counted.keys() - set(foreign)):
        print(f"{counted[what]} {what}")
    facts, doubts = describe_labels(whole, () if target.classes is None else target.classes.names)
    for line in facts:
        print(line)
    for line in doubts:
        print(f"look at it: {line}", file=sys.stderr)
    path = report_path(out, "import", (1, 1))
    done = len(results) - len(failed)
    print(f"import: {done} done, {len(jobs) - len(left)} skipped, {len(failed)} failed; report in {path}")
    if failed:
        print(f"first failure: {failed[0].reason}", file=sys.stderr)
        return ERROR if arguments.strict else PARTLY_FAILED
    return DONE


def write_report(out: Path, results: list[Imported], skipped: int) -> None:
    failed = sorted((str(each.job.frame), each.job.key, each.reason) for each in results if each.reason)
    path = report_path(out, "import", (1, 1))
    try:
        before = [each for each in read_json(path)["noticed"] if isinstance(each["frame"], str)]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        before = []
    again = {str(each.job.frame) for each in results}
    noticed = [each for each in before if each["frame"] not in again]  # of pictures that were not imported again
    noticed += [
        {"frame": str(each.job.frame), "picture": each.job.key, **each.counts} for each in results if each.counts
    ]
    noticed.sort(key=lambda each: each["frame"])
    write_json(
        path,
        {
            "done": len(results) - len(failed),
            "skipped": skipped,
            "failed": [{"frame": frame, "picture": key, "reason": reason} for frame, key, reason in failed],
            "noticed": noticed,
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
