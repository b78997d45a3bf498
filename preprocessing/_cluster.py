"""Units of work on the workers of a dask.distributed scheduler, on any machines.

dask distributes the units, moves them to another worker if one dies, and gives up a unit after it has killed several
workers. Workers must see the data under the same paths, as on the shared disk of a cluster.
"""

import contextlib
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class ClusterError(Exception):
    """Work cannot be sent to the scheduler; the message gives the reason and what to do."""


def map_units(work: Callable, units: Iterable, address: str) -> Iterator[tuple[object, object]]:
    """Yield (unit, result) as results come, as `preprocessing._pool.map_units` does.

    `address`: of the scheduler, such as tcp://host:8786. ClusterError if dask is not installed or no scheduler responds
    there. Leaving the loop early cancels the remaining units.
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
            f"no dask scheduler responds at {address!r} ({error}): start one with `dask scheduler` and workers with "
            f"`dask worker {address}`"
        ) from error
    with client:
        client.register_plugin(_make_worker_plugin())
        if not client.scheduler_info()["workers"]:
            print(f"the scheduler at {address} has no workers yet: start some with `dask worker {address}`", flush=True)
        suspects = []
        for unit, result in _collect(client, work, units):
            if isinstance(result, KilledWorker):
                suspects.append(unit)  # perhaps another unit killed the worker, so each suspect runs again alone
            else:
                yield unit, result
        for suspect in suspects:
            for unit, result in _collect(client, work, [suspect]):
                died = isinstance(result, KilledWorker)
                yield unit, ClusterError("it killed every worker that tried it (out of memory?)") if died else result


def _collect(client, work: Callable, units: Iterable) -> Iterator[tuple[object, object]]:
    """Yield (unit, result or exception) as results come.

    Work and units are sent as pickled bytes, which only workers unpickle: the scheduler unpickles everything else, and
    it does not have the modules of this project.
    """
    from distributed import as_completed

    units = list(units)
    work_bytes = pickle.dumps(work)

    def run_unit(unit_bytes: bytes) -> object:
        import pickle

        return pickle.loads(work_bytes)(pickle.loads(unit_bytes))

    futures = dict(zip(client.map(run_unit, list(map(pickle.dumps, units)), pure=False), units, strict=True))
    try:
        for future in as_completed(list(futures)):
            try:
                result = future.result()
            except Exception as error:  # an error of the work, or the death of its worker
                result = error
            yield futures.pop(future), result
    finally:
        with contextlib.suppress(Exception):  # the scheduler may be gone, which may be why the loop ended
            client.cancel(list(futures))


def _make_worker_plugin():
    """A plugin that sets up each worker: it adds this project to sys.path and limits OpenCV to one thread.

    A class that is defined in a function is pickled by value, so a worker can unpickle it before it has the project.
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
