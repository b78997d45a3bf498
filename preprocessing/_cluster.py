"""The same units of work on the workers of a dask.distributed scheduler, wherever these are.

A thin adapter: dask hands out the units, moves them to another worker when one dies, and gives a unit up, by name, when
it has cost several workers their lives. Workers must see the data under the same paths, as on a cluster's shared disk.
"""

import contextlib
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class ClusterError(Exception):
    """No work can be sent to the scheduler; the message says why and what to do."""


def map_units(work: Callable, units: Iterable, address: str) -> Iterator[tuple[object, object]]:
    """Yield (unit, result) as results come, as `preprocessing._pool.map_units` does.

    `address`: of the scheduler, such as tcp://host:8786. ClusterError if dask is not installed or nobody answers there.
    Leaving the loop early takes back what is not done.
    """
    try:
        from distributed import Client, KilledWorker
    except ImportError as error:
        raise ClusterError(
            f"--cluster needs dask.distributed ({error}): pip install 'dask[distributed]', or leave --cluster out"
        ) from error
    try:
        client = Client(address, timeout="10s")
    except (OSError, ValueError, TimeoutError) as error:
        raise ClusterError(
            f"no dask scheduler answers at {address!r} ({error}): start one by `dask scheduler` and workers by "
            f"`dask worker {address}`"
        ) from error
    with client:
        client.register_plugin(_make_worker_plugin())
        if not client.scheduler_info()["workers"]:
            print(f"the scheduler at {address} has no workers yet: start some by `dask worker {address}`", flush=True)
        suspects = []
        for unit, result in _collect(client, work, units):
            if isinstance(result, KilledWorker):
                suspects.append(unit)  # or it only was where another one killed the worker
            else:
                yield unit, result
        for suspect in suspects:
            for unit, result in _collect(client, work, [suspect]):
                died = isinstance(result, KilledWorker)
                yield unit, ClusterError("it killed every worker that tried it (out of memory?)") if died else result


def _collect(client, work: Callable, units: Iterable) -> Iterator[tuple[object, object]]:
    """(unit, result or exception) as they come. Work and units travel as bytes that only workers open, because the
    scheduler, who opens everything else, lacks our modules."""
    from distributed import as_completed

    units = list(units)
    work_bytes = pickle.dumps(work)

    def serve(unit_bytes: bytes) -> object:
        import pickle

        return pickle.loads(work_bytes)(pickle.loads(unit_bytes))

    futures = dict(zip(client.map(serve, list(map(pickle.dumps, units)), pure=False), units, strict=True))
    try:
        for future in as_completed(list(futures)):
            try:
                result = future.result()
            except Exception as error:  # whatever the work raised, or what became of its worker
                result = error
            yield futures.pop(future), result
    finally:
        with contextlib.suppress(Exception):  # the scheduler may be gone, which is why we are here
            client.cancel(list(futures))


def _make_worker_plugin():
    """What each worker does first: find this project's modules, and leave the parallelism to dask.

    A class made in a function travels by value, so that a worker need not know the project to receive it.
    """
    from distributed import WorkerPlugin

    root = str(ROOT)

    class ProjectPlugin(WorkerPlugin):
        name = "asymmetric-multitask"

        def setup(self, worker):
            import sys

            sys.path[:0] = [path for path in (root, f"{root}/preprocessing") if path not in sys.path]
            import cv2

            cv2.setNumThreads(1)

    return ProjectPlugin()
