"""A pool of worker processes that survives the death of any of them.

Each worker has one unit of work in flight, handed over by a pipe, so a unit whose worker dies (segfault in a decoder,
kernel out of memory) is known by name; a new worker takes its place and every other unit is done.
"""

import contextlib
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import cv2

# "spawn": a worker starts clean, without the threads and locks of its parent
_CONTEXT = multiprocessing.get_context("spawn")


class WorkerDiedError(Exception):
    """The worker of a unit ended before it answered; holds the reason in words."""


@dataclass
class _Worker:
    process: multiprocessing.Process
    pipe: Connection
    unit: object = None


def _serve(pipe: Connection, work: Callable) -> None:
    """Worker: answer each unit with (True, result) or (False, exception), until None comes or the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    cv2.setNumThreads(1)  # the pool is the parallelism
    while True:
        try:
            unit = pipe.recv()
        except (EOFError, ConnectionError):
            return
        if unit is None:
            return
        try:
            answer = (True, work(unit))
        except Exception as error:
            answer = (False, error)
        try:
            pipe.send(answer)
        except ConnectionError:
            return


def _start_worker(work: Callable) -> _Worker:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the pool is the parallelism; numpy reads this in each worker
    ours, theirs = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_serve, args=(theirs, work), daemon=True)
    process.start()
    theirs.close()
    return _Worker(process, ours)


def _describe_death(process: multiprocessing.Process) -> str:
    process.join()
    if process.exitcode is not None and process.exitcode < 0:
        number = -process.exitcode
        name = signal.Signals(number).name if number in set(signal.Signals) else str(number)
        hint = " (out of memory?)" if name == "SIGKILL" else ""
        return f"its worker was killed by {name}{hint}"
    return f"its worker ended with exit code {process.exitcode}"


def map_units(work: Callable, units: Iterable, workers: int) -> Iterator[tuple[object, object]]:
    """Yield (unit, result) as results come, in no fixed order; the result is an exception where `work` raised one.

    A unit whose worker died gets a WorkerDiedError. `work` and the units travel by pickle. Leaving the loop early ends
    the workers.
    """
    remaining = iter(units)
    team: list[_Worker] = []

    def hand_over(worker: _Worker) -> bool:
        worker.unit = next(remaining, None)
        if worker.unit is None:
            return False
        with contextlib.suppress(ConnectionError):  # it died; reading its answer will tell
            worker.pipe.send(worker.unit)
        return True

    try:
        for _ in range(workers):
            worker = _start_worker(work)
            team.append(worker)
            if not hand_over(worker):
                break
        busy = [worker for worker in team if worker.unit is not None]
        while busy:
            for pipe in wait([worker.pipe for worker in busy]):
                worker = next(worker for worker in busy if worker.pipe is pipe)
                unit = worker.unit
                try:
                    _, result = pipe.recv()
                except (EOFError, ConnectionError):
                    result = WorkerDiedError(_describe_death(worker.process))
                    busy.remove(worker)
                    team.remove(worker)
                    worker.pipe.close()
                    worker = _start_worker(work)
                    team.append(worker)
                    busy.append(worker)
                except Exception as error:  # some exceptions that `work` raises cannot be rebuilt from their pickle
                    result = error
                if not hand_over(worker):
                    busy.remove(worker)
                yield unit, result
    finally:
        for worker in team:
            worker.pipe.close()  # an idle worker reads the end and leaves
        for worker in team:
            worker.process.join(timeout=1)
            if worker.process.is_alive():
                worker.process.terminate()
                worker.process.join()
