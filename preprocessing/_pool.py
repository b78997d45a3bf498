"""A pool of worker processes that survives the death of any of them.

Each worker processes one unit at a time, which it receives through a pipe. If a worker dies (a segmentation fault in a
decoder, killed for lack of memory), its unit is therefore known; a new worker replaces it, and all other units are
processed.
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
    """The worker of a unit ended before it returned a result; the message gives the reason."""


@dataclass
class _Worker:
    process: multiprocessing.Process
    pipe: Connection
    unit: object = None


def _serve(pipe: Connection, work: Callable) -> None:
    """Loop of a worker: for each unit, send (True, result) or (False, exception), until the unit is None or the parent
    is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the parent ends its workers
    cv2.setNumThreads(1)  # the workers run in parallel already
    while True:
        try:
            unit = pipe.recv()
        except (EOFError, ConnectionError):
            return
        if unit is None:
            return
        try:
            message = (True, work(unit))
        except Exception as error:
            message = (False, error)
        try:
            pipe.send(message)
        except ConnectionError:
            return


def _start_worker(work: Callable) -> _Worker:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read by numpy in each worker; the workers run in parallel
    parent_end, worker_end = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_serve, args=(worker_end, work), daemon=True)
    process.start()
    worker_end.close()
    return _Worker(process, parent_end)


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

    The result of a unit whose worker died is a WorkerDiedError. `work` and the units must be picklable. Leaving the
    loop early ends the workers.
    """
    remaining = iter(units)
    pool: list[_Worker] = []

    def send_next_unit(worker: _Worker) -> bool:
        worker.unit = next(remaining, None)
        if worker.unit is None:
            return False
        with contextlib.suppress(ConnectionError):  # the worker died, which receiving its result will detect
            worker.pipe.send(worker.unit)
        return True

    try:
        for _ in range(workers):
            worker = _start_worker(work)
            pool.append(worker)
            if not send_next_unit(worker):
                break
        busy = [worker for worker in pool if worker.unit is not None]
        while busy:
            for pipe in wait([worker.pipe for worker in busy]):
                worker = next(worker for worker in busy if worker.pipe is pipe)
                unit = worker.unit
                try:
                    _, result = pipe.recv()
                except (EOFError, ConnectionError):
                    result = WorkerDiedError(_describe_death(worker.process))
                    busy.remove(worker)
                    pool.remove(worker)
                    worker.pipe.close()
                    worker = _start_worker(work)
                    pool.append(worker)
                    busy.append(worker)
                except Exception as error:  # some exceptions of `work` cannot be unpickled
                    result = error
                if not send_next_unit(worker):
                    busy.remove(worker)
                yield unit, result
    finally:
        for worker in pool:
            worker.pipe.close()  # an idle worker reads the end of the pipe and exits
        for worker in pool:
            worker.process.join(timeout=1)
            if worker.process.is_alive():
                worker.process.terminate()
                worker.process.join()
