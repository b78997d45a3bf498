"""The progress line of a download: share, rate and time left."""

import sys
import threading
import time
from collections import deque

from a2d2.download.errors import StoppedError


def format_bytes(count: int) -> str:
    """`count` bytes as readable text, in powers of 1000: "48.0 GB"."""
    if count < 1000:
        return f"{count} B"
    size = float(count)
    for unit in ("kB", "MB", "GB"):
        size /= 1000
        if size < 1000:
            return f"{size:.1f} {unit}"
    return f"{size / 1000:.1f} TB"


def format_seconds(seconds: float) -> str:
    """`seconds` as hours, minutes and seconds: "2:05:09"."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}"


class Progress:
    """A line with share, rate and time left: redrawn on a terminal, printed once a minute into a file.

    After `with Progress(label) as progress`, the terminal is at the start of a new line. Threads may share an instance.
    Once `stop` is set, `add` and `wait` raise StoppedError.
    """

    RATE_WINDOW_S = 20.0

    def __init__(self, label: str):
        self.label = label
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._terminal = sys.stderr.isatty()
        self._line_is_open = False
        self.start(0, 0)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._line_is_open:
                self._draw()
            self._end_line()

    def start(self, done: int, total: int) -> None:
        """Sets the count to `done` of `total` bytes; earlier bytes do not count for the rate."""
        with self._lock:
            self._done, self._total = done, total
            self._samples = deque([(time.monotonic(), done)])
            self._shown = time.monotonic()

    def add(self, count: int) -> None:
        """Adds `count` bytes and redraws the line if it is due."""
        if self.stop.is_set():
            raise StoppedError
        with self._lock:
            self._done += count
            now = time.monotonic()
            if now - self._shown >= (0.2 if self._terminal else 60.0):
                self._shown = now
                self._samples.append((now, self._done))
                while now - self._samples[0][0] > self.RATE_WINDOW_S and len(self._samples) > 2:
                    self._samples.popleft()
                self._draw()

    def wait(self, seconds: float) -> None:
        """Sleeps for `seconds`; raises StoppedError as soon as `stop` is set."""
        if self.stop.wait(seconds):
            raise StoppedError

    def note(self, text: str) -> None:
        """Prints a message on a separate line."""
        with self._lock:
            self._end_line()
            print(f"{self.label}: {text}", file=sys.stderr, flush=True)

    def _draw(self) -> None:
        (begun, before), (now, done) = self._samples[0], (time.monotonic(), self._done)
        rate = (done - before) / max(now - begun, 1e-6)
        left = format_seconds(max(self._total - done, 0) / rate) if rate > 0 else "?"
        share = min(done / self._total, 1.0) if self._total else 0.0
        text = f"{self.label}: {share:4.0%} of {format_bytes(self._total)}, {format_bytes(int(rate))}/s, {left} left"
        if self._terminal:
            print(f"\r{text}\x1b[K", end="", file=sys.stderr, flush=True)
            self._line_is_open = True
        else:
            print(text, file=sys.stderr, flush=True)

    def _end_line(self) -> None:
        if self._line_is_open:
            print(file=sys.stderr)
            self._line_is_open = False
