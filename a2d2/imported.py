"""Anyone's pictures and labels -> derived files, as the scripts for A2D2 write them (docs/own-data.md).

What belongs together has the same relative path, once the ending of the file and `_image`, `_label` or `_depth` at the
end of its name are dropped. A folder, or a part of the path, is a scene; in it the pictures have numbers, which stay
when others come.
"""

import csv
import hashlib
import io
import math
import os
import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import cv2
import numpy as np
from jaxtyping import UInt8, UInt16
from PIL import Image, ImageOps, UnidentifiedImageError

from a2d2.checks.known import MAIN_VIEW
from a2d2.classes import IGNORE
from a2d2.frames import NO_SCENES, SCENE_NAME, Frame
from a2d2.images import (
    ImageError,
    encode_jpeg,
    encode_json,
    encode_npy,
    encode_png,
    read_depth_png,
    read_json,
    read_yaml,
    write_bytes,
)
from a2d2.lidar import DEPTH_SCALE, splat_depth
from a2d2.predictions import PICTURES, read_any_picture

VIEW = MAIN_VIEW
ENDINGS = ("_image", "_label", "_depth")
LISTED_ENDINGS = PICTURES | {".gif"}  # of pictures in a list; what else follows a dot there belongs to the name
SAME_SHAPE = 0.02  # two aspect ratios that differ by less are one
CROWD = "crowd"  # class of a box of COCO that stands for several objects; it is ignored, as an unknown class is


class ImportFilesError(ValueError):
    """Files that cannot be imported; the message says which, and what to do."""


@dataclass(frozen=True)
class ClassList:
    """`names`: by id; `colours`: RGB by id, None for masks of ids."""

    names: tuple[str, ...]
    colours: tuple[tuple[int, int, int], ...] | None = None


def read_class_list(path: Path) -> ClassList:
    """`classes: [name of id 0, name of id 1, ...]` or `classes: {name: [r, g, b], ...}` in a YAML file.

    ImportFilesError for a file that has neither.
    """
    try:
        content = read_yaml(path)
    except ValueError as error:
        raise ImportFilesError(f"--classes {error}") from error
    given = content.get("classes") if isinstance(content, dict) else None
    for name in given if isinstance(given, list | dict) else ():
        if not isinstance(name, str) or not name.strip():
            raise ImportFilesError(
                f'--classes {path}: the class {name!r} is no text: put its name in quotes, such as "no" or "12"'
            )
    if isinstance(given, list) and given:
        names, colours = tuple(given), None
    elif isinstance(given, dict) and given:
        names = tuple(given)
        for name, colour in given.items():
            whole = isinstance(colour, list) and len(colour) == 3 and all(type(part) is int for part in colour)
            if not whole or not all(0 <= part <= 255 for part in colour):
                raise ImportFilesError(
                    f"--classes {path}: {name}: {colour} is no colour; write [r, g, b], each 0 to 255"
                )
        colours = tuple(tuple(colour) for colour in given.values())
    else:
        raise ImportFilesError(
            f"--classes {path}: must hold `classes: [name of id 0, name of id 1, ...]` or `classes: {{name: [r, g, "
            f"b]}}`"
        )
    if len(names) > IGNORE:
        raise ImportFilesError(f"--classes {path}: {len(names)} classes, and there is room for {IGNORE}")
    for kind, values in (("class", names), ("colour", colours or ())):
        if twice := [value for value, count in Counter(values).items() if count > 1]:
            raise ImportFilesError(f"--classes {path}: the {kind} {twice[0]!r} is given twice")
    return ClassList(names, colours)


# ---------------------------------------------------------------- which files belong together


def find_key(place: PurePosixPath) -> str:
    """What the files of one picture have in common, from the path of any of them below its folder."""
    return _drop_label(place, place.stem)


def find_listed_key(name: object) -> str:
    """The same from the name of a picture in a list, which may lack its ending: in `frame.001` the dot begins none.

    ValueError for what cannot be the name of a file, such as nothing.
    """
    place = PurePosixPath(name) if isinstance(name, str) else PurePosixPath()
    if not place.name:
        raise ValueError(f"{name!r} is no name of a picture")
    return _drop_label(place, place.stem if place.suffix.lower() in LISTED_ENDINGS else place.name)


def _drop_label(place: PurePosixPath, name: str) -> str:
    for ending in ENDINGS:
        if name.endswith(ending) and name != ending:
            name = name.removesuffix(ending)
            break
    return str(place.with_name(name))


def list_files(folder: Path, endings: Collection[str]) -> dict[str, Path]:
    """Key -> file, of all files with these endings below a folder. Folders that are links are followed, and what begins
    with a dot is hidden. ImportFilesError if two files have one key."""
    found: dict[str, Path] = {}
    for path in _walk(folder):
        if path.suffix.lower() in endings:
            key = find_key(PurePosixPath(path.relative_to(folder).as_posix()))
            if key in found:
                raise ImportFilesError(f"{found[key]} and {path} have one name ({key}): leave one of them out")
            found[key] = path
    return found


def list_unread(folder: Path, endings: Collection[str]) -> list[Path]:
    """The pictures below a folder that list_files leaves out for their endings."""
    return [path for path in _walk(folder) if path.suffix.lower() in PICTURES - set(endings)]


def _walk(folder: Path) -> list[Path]:
    """All files below a folder, sorted. ImportFilesError if there is no folder, OSError for one that cannot be read."""

    def stop(error: OSError) -> None:
        raise error

    if not folder.is_dir():
        raise ImportFilesError(f"there is no folder {folder}")
    found: list[Path] = []
    above = {str(folder): (os.path.realpath(folder),)}  # the real folders that lead to one
    for place, folders, names in os.walk(folder, followlinks=True, onerror=stop):
        chain = above.pop(place)
        kept = []
        for name in folders:
            real = os.path.realpath(os.path.join(place, name))
            # a link to a folder that it lies in would be followed for ever
            if not name.startswith(".") and not any(os.path.commonpath([real, each]) == real for each in chain):
                kept.append(name)
                above[os.path.join(place, name)] = (*chain, real)
        folders[:] = kept
        found += [Path(place, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def name_scenes(
    keys: Iterable[str], group_by: str, prefix: str = "", before: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Key -> its scene. group_by: "folder", or a regular expression that is matched at the start of the key. prefix:
    what all names begin with; before: key -> its scene in an earlier import.

    ImportFilesError for an expression that is none, or that does not match a key, where two scenes would have one name,
    and for a name that no scene can have.
    """
    pattern = None
    if group_by != "folder":
        try:
            pattern = re.compile(group_by)
        except re.error as error:
            raise ImportFilesError(f"--group-by {group_by!r} is no regular expression: {error}") from error
    if prefix and not SCENE_NAME.match(prefix):
        raise ImportFilesError(f"--prefix {prefix!r}: must begin with a letter or digit; then _ - . may follow, too")
    texts: dict[str, str] = {}
    for key in keys:
        if pattern is None:
            text = str(PurePosixPath(key).parent)
            texts[key] = "all" if text == "." else text
        else:
            match = pattern.match(key)
            if match is None or not match[0]:
                raise ImportFilesError(f"--group-by {group_by!r} does not match {key!r}, so its scene has no name")
            texts[key] = match[0]
    names = {text: _name_scene(text, prefix, exact=True) for text in texts.values()}
    for key, text in texts.items():
        # imports of before dropped all letters but those of ASCII; their scenes keep their names
        if (before or {}).get(key) == (former := _name_scene(text, prefix, exact=False)):
            names[text] = former
    origin: dict[str, str] = {}
    for text, name in names.items():
        if origin.setdefault(name, text) != text:
            raise ImportFilesError(
                f"{origin[name]!r} and {text!r} would both be the scene {name!r}: rename a folder, or take another "
                "--group-by"
            )
        if name in NO_SCENES:
            raise ImportFilesError(
                f"{text!r} would be the scene {name!r}, and a dataset keeps no scene there: rename the folder, take "
                "another --group-by, or give a --prefix"
            )
        assert SCENE_NAME.match(name), name
    return {key: names[text] for key, text in texts.items()}


def _name_scene(text: str, prefix: str, exact: bool) -> str:
    """exact: texts that differ in other letters than those of ASCII differ by a digest."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "_", text).strip("_.-") or "scene"
    if exact and not text.isascii():
        name += f"_{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()[:8]}"
    return f"{prefix}_{name}" if prefix else name


def number_pictures(scenes: Mapping[str, str], known: Mapping[str, str], out: Path) -> dict[str, Frame]:
    """Key -> its frame. known: "scene/view/id" -> key, from an earlier import, whose numbers stay. ImportFilesError for
    a picture that was of another scene then: it would be in the dataset twice."""
    numbers: dict[str, int] = defaultdict(int)
    before: dict[str, str] = {}
    for frame, key in known.items():
        scene, _, identity = frame.split("/")
        numbers[scene] = max(numbers[scene], int(identity) + 1)
        before[key] = frame
    frames = {}
    for key, scene in sorted(scenes.items()):
        if key in before:
            former, _, identity = before[key].split("/")
            if former != scene:
                raise ImportFilesError(
                    f"{key!r} is in {out} already, in the scene {former!r}, and would be in {scene!r} now: use the "
                    "--group-by and --prefix of the first import, or import into another folder"
                )
        else:
            identity = f"{numbers[scene]:09d}"
            numbers[scene] += 1
        frames[key] = Frame(scene, VIEW, identity, out)
    return frames


# ---------------------------------------------------------------- labels beside pictures


@dataclass(frozen=True)
class CocoBoxes:
    """`names`: of the classes, in the order of their ids; `of_key`: key -> (class, [x, y, width, height], crowd) of its
    boxes; `size`: key -> the (width, height) that the file says its picture has; `others`: file names that are of no
    picture."""

    names: tuple[str, ...]
    of_key: Mapping[str, list[tuple[str, list[float], bool]]]
    size: Mapping[str, tuple[int, int]]
    others: tuple[str, ...] = ()


def read_coco(path: Path, keys: Iterable[str]) -> CocoBoxes:
    """Boxes in COCO's format. A file name is a key, or the end of one from a folder's name on.

    ImportFilesError if it is no such file, if no file name fits, or if one fits two pictures, or two fit one.
    """
    keys = set(keys)
    last: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        last[PurePosixPath(key).name].append(key)
    try:
        content = read_json(path)
        categories, images, annotations = (
            _index_by_id(content[name], name) if name != "annotations" else list(content[name])
            for name in ("categories", "images", "annotations")
        )
        classes = _read_classes(categories)
        key_of: dict[int | str, str] = {}
        others, image_of, size = [], {}, {}
        for identity, image in images.items():
            try:
                key = find_listed_key(image["file_name"])
            except ValueError as error:
                raise ImportFilesError(f"image {identity!r}: {error}") from error
            fitting = (
                [key] if key in keys else [each for each in last[PurePosixPath(key).name] if each.endswith(f"/{key}")]
            )
            if len(fitting) > 1:
                raise ImportFilesError(f"{image['file_name']} may be {' or '.join(sorted(fitting)[:3])}")
            if not fitting:
                others.append(image["file_name"])
                continue
            key = fitting[0]
            if key in image_of:
                raise ImportFilesError(
                    f"the images {image_of[key]!r} and {identity!r} are one picture, {key}: leave one of them out"
                )
            key_of[identity], image_of[key] = key, identity
            given = image.get("width"), image.get("height")
            if None not in given:
                if not all(type(value) in (int, float) and 0 < value < _FAR and value == int(value) for value in given):
                    raise ImportFilesError(
                        f"image {identity!r} ({image['file_name']}) has the size {given[0]}x{given[1]}"
                    )
                size[key] = int(given[0]), int(given[1])
        boxes: dict[str, list[tuple[str, list[float], bool]]] = {key: [] for key in image_of}
        for each in annotations:
            about = f"annotation {each.get('id')}"
            if not _is_id(each["image_id"]) or each["image_id"] not in images:
                raise ImportFilesError(f"{about} is of no image there is (image_id {each['image_id']!r})")
            if each["image_id"] not in key_of:
                continue
            category = each.get("category_id")
            if not _is_id(category) or category not in classes:
                raise ImportFilesError(f"{about} is of no category there is (category_id {category!r})")
            box = _read_box(each.get("bbox"))
            if box is None:
                raise ImportFilesError(
                    f"{about} has the box {each.get('bbox')}: it must be [x, y, width, height]; leave the annotation "
                    "out if there is none"
                )
            boxes[key_of[each["image_id"]]].append((classes[category], box, bool(each.get("iscrowd", 0))))
        ends = [max(x + wide, y + high) for found in boxes.values() for _, (x, y, wide, high), _ in found]
        if ends and max(ends) <= 1:
            raise ImportFilesError(
                f"no box reaches beyond {max(ends):.4g}, so they seem to be shares of the picture; COCO's are in pixels"
            )
    except OSError as error:
        raise ImportFilesError(f"--boxes {path}: cannot be read: {error.strerror}") from error
    except ImportFilesError as error:
        raise ImportFilesError(f"--boxes {path}: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ImportFilesError(f"--boxes {path}: is no file of COCO's detections ({error!r})") from error
    if not boxes:
        shown = f", such as {others[0]!r}" if others else ""
        raise ImportFilesError(f"--boxes {path}: none of its {len(images)} file names{shown} is one of the pictures'")
    names = tuple(dict.fromkeys(classes[identity] for identity in sorted(classes)))
    return CocoBoxes(names, boxes, size, tuple(others))


def _is_id(value: object) -> bool:
    return isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool))


def _index_by_id(entries: list[dict[str, Any]], name: str) -> dict[int | str, dict[str, Any]]:
    """ImportFilesError for an id that is none, that is there twice, or that is text where others are numbers."""
    found: dict[int | str, dict[str, Any]] = {}
    for each in entries:
        identity = each.get("id")
        if not _is_id(identity):
            raise ImportFilesError(f"one of the {name} has the id {identity!r}: it must be a whole number or text")
        if identity in found:
            raise ImportFilesError(
                f"the id {identity!r} of {name} is there twice: which of them an annotation means is open"
            )
        found[identity] = each
    if len(kinds := {type(identity): identity for identity in found}) > 1:
        shown = " and ".join(repr(identity) for identity in kinds.values())
        raise ImportFilesError(f"the ids of {name} are numbers and texts, such as {shown}: make them alike")
    return found


def _read_classes(categories: Mapping[int | str, Mapping[str, Any]]) -> dict[int | str, str]:
    """Id -> name of the class. ImportFilesError if there is none, and for a name that cannot be one."""
    classes = {}
    for identity, each in categories.items():
        name = each.get("name")
        if not _is_id(name) or not f"{name}".strip():
            raise ImportFilesError(f"the category {identity!r} has the name {name!r}: give it one")
        if name == CROWD:
            raise ImportFilesError(
                f"the category {identity!r} is called {CROWD!r}, as boxes that stand for several objects are called "
                "here, and these are ignored: give it another name"
            )
        classes[identity] = str(name)
    if not classes:
        raise ImportFilesError("there are no categories, so its boxes have no classes")
    return classes


def _read_box(given: object) -> list[float] | None:
    """None for what is no box."""
    if not isinstance(given, list) or len(given) != 4 or not all(type(value) in (int, float) for value in given):
        return None
    return (
        [float(value) for value in given] if all(abs(value) < _FAR for value in given) and min(given[2:]) >= 0 else None
    )


_FAR = 1e9  # pixels: no picture is as large, and neither infinity nor what is no number is below it


def read_angles(path: Path, keys: Iterable[str]) -> tuple[dict[str, float], list[str]]:
    """Key -> steering angle in degrees, left positive, from a CSV file with the columns picture and angle_deg; and the
    names in it that are of no picture.

    ImportFilesError for another file, an angle that is no number, a picture that is there twice, or if none fits.
    """
    keys, found, others = set(keys), {}, []
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            columns = list(reader.fieldnames or ())
            if not {"picture", "angle_deg"} <= set(columns):
                raise ImportFilesError(
                    f"--angles {path}: its columns are {reader.fieldnames}; picture and angle_deg must be there"
                )
            for name in ("picture", "angle_deg"):
                if columns.count(name) > 1:
                    raise ImportFilesError(f"--angles {path}: it has {columns.count(name)} columns {name}; keep one")
            rows = 0
            for row in reader:
                rows += 1
                where = f"--angles {path}, line {reader.line_num}"
                if None in row:
                    raise ImportFilesError(
                        f"{where}: it has {len(columns) + len(row[None])} cells, and there are {len(columns)} columns; "
                        "a number has a decimal point, no comma"
                    )
                try:
                    key = find_listed_key(row["picture"])
                except ValueError as error:
                    raise ImportFilesError(f"{where}: {error}") from error
                try:
                    angle = float(row["angle_deg"].replace("_", "no digit"))
                except (AttributeError, ValueError):
                    angle = math.nan
                if not math.isfinite(angle):
                    raise ImportFilesError(f"{where}: {row['angle_deg']!r} is no angle")
                if key in found:
                    raise ImportFilesError(f"{where}: {row['picture']} is there twice")
                if key in keys:
                    found[key] = angle
                else:
                    others.append(row["picture"])
    except OSError as error:
        raise ImportFilesError(f"--angles {path}: cannot be read: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise ImportFilesError(f"--angles {path}: is no CSV file ({error})") from error
    if not found:
        shown = f", such as {others[0]!r}," if others else ""
        raise ImportFilesError(f"--angles {path}: none of its {rows} pictures{shown} is one of those given")
    return found, others


# ---------------------------------------------------------------- one picture, on a worker


@dataclass(frozen=True)
class Job:
    """All that is known of one picture: its files, and the labels that files of all pictures hold."""

    key: str
    frame: Frame
    picture: Path
    mask: Path | None = None
    depth: Path | None = None
    boxes: tuple[tuple[str, list[float], bool], ...] | None = None
    boxes_size: tuple[int, int] | None = None
    angle: float | None = None


@dataclass(frozen=True)
class Target:
    """What all derived files have in common: (width, height) `size`, the `classes` of masks, and the kind of image."""

    size: tuple[int, int]
    classes: ClassList | None
    image_kind: str = "image"


@dataclass(frozen=True)
class Imported:
    """What became of a job. `reason`: why it failed, else empty; `counts`: what a report should list."""

    job: Job
    reason: str = ""
    counts: dict[str, int] = field(default_factory=dict)


def list_kinds(job: Job, target: Target) -> list[str]:
    """The kinds of file that a picture gets; the image is written last, so that a frame that has one is whole."""
    labels = {"segmentation": job.mask, "depth": job.depth, "boxes": job.boxes, "steering": job.angle}
    return [kind for kind, label in labels.items() if label is not None] + [target.image_kind]


def describe_sources(job: Job) -> dict[str, Any]:
    """By kind, what tells whether that of which a picture's files are made has changed since: the size and time of a
    file, a digest of its boxes, its angle. OSError for a file that is not there any more."""
    found: dict[str, Any] = {}
    for kind, path in (("image", job.picture), ("segmentation", job.mask), ("depth", job.depth)):
        if path is not None:
            about = path.stat()
            found[kind] = [about.st_size, about.st_mtime_ns]
    if job.boxes is not None:
        found["boxes"] = hashlib.sha256(encode_json([job.boxes, job.boxes_size])).hexdigest()[:16]
    if job.angle is not None:
        found["steering"] = job.angle
    return found


def import_picture(job: Job, target: Target) -> Imported:
    """Write the derived files of one picture; a damaged or unfit file fails it, and nothing of it is written."""
    try:
        image = read_any_picture(job.picture)
        own = image.shape[1], image.shape[0]
        check_shape(own, target.size, str(job.picture))
        files: dict[str, bytes] = {}
        counts: dict[str, int] = {}
        if job.mask is not None and target.classes is not None:
            classes, foreign = read_mask(job.mask, target.classes)
            check_label_shape((classes.shape[1], classes.shape[0]), own, f"{job.mask}, beside its picture,")
            files["segmentation"] = encode_npy(cv2.resize(classes, target.size, interpolation=cv2.INTER_NEAREST_EXACT))
            counts |= {f"pixels of {value}": number for value, number in foreign.items()}
        if job.depth is not None:
            stored = read_depth_png(job.depth)
            check_label_shape((stored.shape[1], stored.shape[0]), own, f"{job.depth}, beside its picture,")
            files["depth"] = encode_png(resize_depth(stored, target.size))
        if job.boxes is not None:
            if job.boxes_size is not None:
                check_label_shape(job.boxes_size, own, f"{job.key} in the file of the boxes")
            boxes = convert_boxes(job.boxes, job.boxes_size or own, target.size)
            files["boxes"] = encode_json({"boxes": boxes})
            if flat := sum(min(box[2:]) == 0 for _, box, _ in job.boxes):
                counts["boxes without an area"] = flat
            if left_out := len(job.boxes) - len(boxes) - flat:
                counts["boxes outside the picture"] = left_out
        if job.angle is not None:
            files["steering"] = encode_json({"angle_deg": job.angle})
        shrinks = target.size[0] < own[0]
        image = cv2.resize(image, target.size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        files[target.image_kind] = encode_jpeg(image) if target.image_kind == "image" else encode_png(image)
    except (ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        return Imported(job, str(error))
    except OSError as error:
        return Imported(job, f"{error.filename or job.picture}: {error.strerror or error}")
    for kind, content in files.items():
        write_bytes(job.frame.path(kind), content)
    return Imported(job, counts=counts)


def check_shape(found: tuple[int, int], wanted: tuple[int, int], name: str) -> None:
    """ImageError if a picture would have to be distorted to have the (width, height) that is wanted."""
    ratio = (found[0] * wanted[1]) / (found[1] * wanted[0])
    if abs(ratio - 1) > SAME_SHAPE:
        raise ImageError(f"{name} is {found[0]}x{found[1]}, which is not the shape of {wanted[0]}x{wanted[1]}")


def check_label_shape(found: tuple[int, int], own: tuple[int, int], name: str) -> None:
    """The same of a label and its picture, of (width, height) `own`; ImageError says if it may have been turned."""
    try:
        check_shape(found, own, name)
    except ImageError as error:
        if abs(found[0] * own[0] / (found[1] * own[1]) - 1) > SAME_SHAPE:
            raise
        raise ImageError(f"{error}: a picture is turned as its EXIF says, so its labels must be, too") from error


_COLOURS = ("RGB", "RGBA", "P", "PA")  # modes of Pillow that have or index RGB colours
_DEEP = re.compile(r"^(?!BGR).*;16")  # layouts of more bits than Pillow keeps; BMP's BGR;16 has 16 bits in all
_STEPS = {"L;2": 85, "L;4": 17}  # Pillow spreads gray of few bits over 0 to 255


def read_mask(path: Path, classes: ClassList) -> tuple[UInt8[np.ndarray, "h w"], dict[str, int]]:
    """A mask as ids of the classes, 255 for what is not listed; and how many pixels have each unlisted value but 255.

    It is turned as its EXIF says, as a picture is. ImageError for a damaged mask, for one of colours where ids are
    expected, or the other way round, and for a format whose values are neither.
    """
    try:
        # from memory: of a file it knows Pillow maps a turned TIFF as if it were not turned, and mixes its rows up
        with Image.open(io.BytesIO(path.read_bytes())) as opened:
            layout = _find_layout(opened)
            opened.load()
            mask = ImageOps.exif_transpose(opened)
            mode = mask.mode
            array = np.asarray(mask.convert("RGB") if classes.colours is not None and mode in _COLOURS else mask)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"{path}: no mask, or a damaged one ({error})") from error
    if _DEEP.search(layout) and not mode.startswith("I"):
        raise ImageError(f"{path} has colours of 16 bits, of which only 8 can be read: save it with 8 bits")
    if classes.colours is not None:
        if mode not in _COLOURS:
            raise ImageError(
                f"{path} holds no RGB colours (mode {mode}), and the classes are given as colours: save it as RGB, or, "
                "if it holds ids, list the names of the classes"
            )
        packed = array.astype(np.int32) @ np.array([65536, 256, 1], dtype=np.int32)
        result = np.full(packed.shape, IGNORE, dtype=np.uint8)
        for index, (red, green, blue) in enumerate(classes.colours):
            result[packed == red * 65536 + green * 256 + blue] = index
        values, numbers = np.unique(packed[result == IGNORE], return_counts=True)
        named = {f"colour #{value:06x}": int(number) for value, number in zip(values, numbers, strict=True)}
        return result, dict(sorted(named.items(), key=lambda item: -item[1])[:10])
    if mode in ("RGB", "RGBA"):
        if (np.ptp(array[..., :3].astype(np.int16), axis=2) > 0).any():
            raise ImageError(f"{path} has colours, and the classes are given as ids: give classes: {{name: [r, g, b]}}")
    elif mode not in ("1", "L", "LA", "P", "PA", "I", "F") and not mode.startswith("I;16"):
        raise ImageError(f"{path} holds no ids (mode {mode}): save it as PNG with one channel of ids")
    if array.ndim == 3:
        array = array[..., 0]
    if mode == "1":
        array = array.astype(np.uint8)
    if mode == "F" and not (np.isfinite(array).all() and (array == np.round(array)).all()):
        raise ImageError(f"{path} holds fractions, and ids are whole numbers: save it as PNG with one channel of ids")
    array = array // _STEPS.get(layout[:3], 1)
    listed = (array >= 0) & (array < len(classes.names))
    values, numbers = np.unique(array[~listed & (array != IGNORE)], return_counts=True)
    named = {f"id {value}": int(number) for value, number in zip(values.astype(int), numbers, strict=True)}
    return np.where(listed, array, IGNORE).astype(np.uint8), dict(sorted(named.items(), key=lambda item: -item[1])[:10])


def _find_layout(opened: Image.Image) -> str:
    """How the file of an image that is not loaded yet stores its pixels, in Pillow's words; empty if unknown."""
    for tile in getattr(opened, "tile", ()):
        arguments = tile[3]
        first = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
        if isinstance(first, str):
            return first
    return ""


def resize_depth(stored: UInt16[np.ndarray, "h w"], size: tuple[int, int]) -> UInt16[np.ndarray, "H W"]:
    """Each point goes to the pixel that contains it, and the nearest of several stays; 0 where there is none."""
    rows, columns = np.nonzero(stored)
    metres = stored[rows, columns] / DEPTH_SCALE
    return splat_depth(rows.astype(float), columns.astype(float), metres, stored.shape[::-1], size)


def convert_boxes(
    boxes: Sequence[tuple[str, list[float], bool]], own: tuple[int, int], size: tuple[int, int]
) -> list[dict[str, Any]]:
    """COCO's boxes as those of a derived file: edges in pixels of `size`, clipped; `visible` is the share that is left.
    Boxes without an area in the picture are left out."""
    scale = np.array([size[0] / own[0], size[1] / own[1]] * 2)
    found = []
    for name, (x, y, width, height), crowd in boxes:
        edges = np.array([x, y, x + width, y + height]) * scale
        clipped = np.clip(edges, 0, [*size, *size])
        area, whole = (np.prod(each[2:] - each[:2]) for each in (clipped, edges))
        if min(clipped[2:] - clipped[:2]) > 0:
            box = [round(float(value), 3) for value in clipped]
            found.append({"box": box, "class": CROWD if crowd else name, "visible": round(float(area / whole), 4)})
    return found


def find_common_size(pictures: Iterable[Path]) -> tuple[int, int]:
    """The (width, height) that most pictures have, by their headers; of equally many the largest."""
    sizes: Counter[tuple[int, int]] = Counter()
    for path in pictures:
        try:
            with Image.open(path) as opened:
                # the camera was held upright; of a TIFF Pillow gives the turned size
                turned = opened.format != "TIFF" and opened.getexif().get(0x0112, 1) >= 5
                sizes[opened.size[::-1] if turned else opened.size] += 1
        except (OSError, UnidentifiedImageError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue  # it will fail with a reason
    if not sizes:
        raise ImportFilesError("none of the pictures can be read")
    return max(sizes, key=lambda size: (sizes[size], size[0] * size[1]))
