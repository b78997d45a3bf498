"""Batches from worker processes whose errors are those of the main process: one clean error, whoever met it."""

import atexit
from collections.abc import Callable, Generator, Iterator
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import DataLoader, Dataset

from training.cycle import move
from training.stopping import IgnoreStops, hold_stops


class WorkerError(RuntimeError):
    """A process that loads data has died; the message says what to change."""


class _Caught:
    """An error about a sample, on its way to the main process."""

    def __init__(self, error: ValueError | OSError):
        self.error = error


class _Guarded(Dataset):
    def __init__(self, dataset: Any):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Any) -> Any:
        try:
            return self.dataset[key]
        except (ValueError, OSError) as error:
            return _Caught(error)


class _Collate:
    def __init__(self, collate: Callable[[list], Any]):
        self.collate = collate

    def __call__(self, samples: list) -> Any:
        caught = [sample for sample in samples if isinstance(sample, _Caught)]
        return caught[0] if caught else self.collate(samples)


def load_batches(dataset: Any, workers: int, device: torch.device, **options: Any) -> Generator[Any, None, None]:
    """The batches of a DataLoader with these options, collated by `dataset.collate`.

    ValueError and OSError of the dataset, as of a damaged file, are raised as they are, not as the traceback of a
    worker process. WorkerError if a worker dies. Workers ignore the signals that ask to stop.

    Close the iterator (`contextlib.closing`), so that its processes end at once and not when it is collected.
    """
    ending = torch.multiprocessing.Event()
    atexit.register(ending.set)
    loader = DataLoader(
        _Guarded(dataset),
        collate_fn=_Collate(dataset.collate),
        num_workers=workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=4 if workers else None,
        worker_init_fn=IgnoreStops(ending),
        **options,
    )
    with hold_stops():
        batches = iter(loader)
    try:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                if workers and (explanation := explain_worker_death(error)):
                    raise WorkerError(explanation) from error
                raise
            if isinstance(batch, _Caught):
                raise batch.error
            yield batch
    finally:
        ending.set()
        atexit.unregister(ending.set)
        # with its last reference the processes are ended in order; as part of a cycle, their queues would end first
        del batches


def send_ahead(cycles: Iterator[Any], device: torch.device) -> Iterator[Any]:
    """The same cycles; on a GPU their copies there are queued on a stream of their own, one cycle ahead, so that they
    run while the cycle before is computed. An error in loading comes when its cycle is asked for."""
    if device.type != "cuda":
        yield from cycles
        return
    stream = torch.cuda.Stream(device)

    def send() -> Any:
        try:
            cycle = next(cycles, None)
        except Exception as error:
            return error
        if cycle is None:
            return None
        with torch.cuda.stream(stream):
            sent = [batch | {key: move(batch[key], device) for key in _ON_DEVICE if key in batch} for batch in cycle]
        return sent, stream.record_event()

    ahead = send()
    while ahead is not None:
        if isinstance(ahead, Exception):
            raise ahead
        cycle, event = ahead
        ahead = send()
        current = torch.cuda.current_stream(device)
        current.wait_event(event)
        for batch in cycle:  # their memory was taken on the other stream
            for leaf in tree_leaves([batch[key] for key in _ON_DEVICE if key in batch]):
                leaf.record_stream(current)
        yield cycle


_ON_DEVICE = ("image", "targets", "soft_targets", "clean")  # of a batch; the rest is for the host


def explain_worker_death(error: BaseException) -> str | None:
    """One line about a worker that died or found no shared memory; None for any other error."""
    text = str(error)
    advice = "take fewer with data.workers (--workers), or smaller batches with train.micro_batch (--micro-batch)"
    if "shared memory" in text or "shm" in text or "Bus error" in text or "/torch_" in text:
        return f"a process that loads frames found /dev/shm full: make it larger, or {advice}"
    if "killed by signal" in text or "exited unexpectedly" in text:
        return (
            f"a process that loads frames has died ({text.splitlines()[0].rstrip('. ')}), probably for lack of memory: "
            f"{advice}"
        )
    return None


def explain_memory(error: BaseException) -> str | None:
    """One line about memory that ran out, in the main process or on the GPU; None for any other error."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError):
        return (
            f"the GPU is out of memory ({text.splitlines()[0][:150]}): take a smaller train.micro_batch, a smaller "
            "model.input_size, or a smaller encoder"
        )
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "not enough memory" in text:
        return "memory has run out: take a smaller train.micro_batch (--micro-batch) or fewer data.workers (--workers)"
    return None
