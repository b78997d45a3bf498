"""One owner at a time for a run folder: two trainings in it would cut each other's log and delete each other's files.

The owner holds a lock on a file in the folder, which the kernel frees when its process ends, however it ends. Locks
do not reach other machines on every network disk, so the file also says who holds it, and a thread touches it twice a
minute: an owner on another machine whose file is still touched is alive.
"""

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from pathlib import Path

NAME = "owner.json"
TOUCH_EVERY, SILENCE = 30, 150  # seconds between two touches; seconds without one after which an owner is dead


class FolderInUseError(ValueError):
    """Another process owns the run folder."""


class Owner:
    """This process as the owner of `folder`, which is made if need be, until `release`.

    FolderInUseError, with who holds it, if another process does; OSError if the folder cannot be written.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / NAME
        self._made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self._take()
        self._released = threading.Event()
        threading.Thread(target=self._touch, daemon=True).start()

    def _take(self) -> int:
        while True:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                locks = self._lock(file)
                with contextlib.suppress(FileNotFoundError):
                    if os.fstat(file).st_ino == os.stat(self.path).st_ino:
                        self._check_holder(file, locks)
                        break
            except BaseException:
                os.close(file)
                raise
            os.close(file)  # an owner that left in this moment took the file with it
        token = {"host": socket.gethostname(), "process": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self._content = json.dumps(token).encode()
        os.ftruncate(file, 0)
        os.pwrite(file, self._content, 0)
        if not locks:  # of two that found a dead owner in the same moment, the one that wrote last goes on
            time.sleep(0.5)
            if os.pread(file, 1000, 0) != self._content:
                holder = _read_holder(file)
                os.close(file)
                raise self._refuse(holder)
        return file

    def _lock(self, file: int) -> bool:
        """Whether the file system has locks; FolderInUseError if another process on this machine holds it."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refuse(_read_holder(file)) from None
        except OSError:
            return False
        return True

    def _check_holder(self, file: int, locks: bool) -> None:
        holder = _read_holder(file)
        if not holder:
            return
        here = holder.get("host") == socket.gethostname()
        # with the lock in hand, an owner on this machine is dead; without locks, its process says so
        if here and (locks or not _is_alive(holder.get("process"))):
            return
        if time.time() - os.fstat(file).st_mtime < SILENCE:
            raise self._refuse(holder)

    def _refuse(self, holder: dict) -> FolderInUseError:
        who = f"process {holder.get('process')} on {holder.get('host')} since {holder.get('since')}"
        return FolderInUseError(
            f"{self.folder} is in use by another training ({who if holder else 'it has just started'}): wait for it, "
            f"or stop it. If it is dead, this lock ends by itself in {SILENCE} s"
        )

    def _touch(self) -> None:
        while not self._released.wait(TOUCH_EVERY):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        """Let the next one have the folder; a folder that is still empty goes with it if it was made here."""
        if self._released.is_set():
            return
        self._released.set()
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self._file)
        if self._made:
            with contextlib.suppress(OSError):
                self.folder.rmdir()


def _read_holder(file: int) -> dict:
    try:
        holder = json.loads(os.pread(file, 1000, 0))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_alive(process: object) -> bool:
    if not isinstance(process, int):
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
