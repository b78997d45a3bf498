"""Files written whole or not at all."""

import contextlib
import errno
import json
import math
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def whole_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside `path`; it takes that name when the block ends well and vanishes when it fails.

    The folder is made if need be. Raises OSError that names the file and the way out if it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            # Without this a power cut can leave the new name with no content behind it.
            os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        # torch.save hides the error of the disk behind a RuntimeError about positions.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(
            f"{path} cannot be written: {cause.strerror or cause}. What was there before is untouched: "
            f"{_advise(cause, path)}."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path: str | Path, content: object) -> None:
    """Write dicts, lists, texts and numbers as JSON, whole or not at all; numbers that are not finite become null."""
    with whole_file(path) as file:
        text = json.dumps(make_json_ready(content), indent=2, ensure_ascii=False) + "\n"
        # a path of another encoding than the locale's is written as the bytes it has on disk
        file.write(text.encode("utf-8", errors="surrogateescape"))


def make_json_ready(content: Any) -> Any:
    """Return dicts, lists and numbers (also of NumPy and torch) as JSON has them; NaN and infinity become None."""
    if isinstance(content, dict):
        return {str(key): make_json_ready(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [make_json_ready(value) for value in content]
    if hasattr(content, "item"):
        content = content.item()
    if isinstance(content, float) and not math.isfinite(content):
        return None
    return content


def _advise(cause: OSError, path: Path) -> str:
    if cause.errno in (errno.EISDIR, errno.ENOTEMPTY, errno.EEXIST) or path.is_dir():
        return f"{path} is a folder; name a file in it"
    if cause.errno in (errno.ENOTDIR, errno.ENOENT):
        return f"{path.parent} is no folder; name a file in a folder"
    if cause.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "choose a folder that you may write to, then go on"
    try:
        free = f" ({shutil.disk_usage(path.parent).free / 1e6:.0f} MB free there)"
    except OSError:
        free = ""
    return f"make room{free} or choose another folder, then go on"
