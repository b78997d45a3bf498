"""Several processes ("ranks") that train one network: who this process is, and the few things that all must agree on.

There is no DistributedDataParallel here, because frames carry labels for any subset of the tasks: it divides by the
number of ranks, also where only one of them has a task. Instead every rank has the whole network, computes its share of
the step's micro-batches, and all gradients are added up once a step. Numbers and objects on the host go through gloo,
also where gradients go through NCCL, so that no GPU has to be waited for.

    torchrun --nproc-per-node 2 -- train.py --config FILE
"""

import datetime
import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Result = TypeVar("Result")


class RankError(RuntimeError):
    """Another rank has ended or is silent; what it said itself is the reason."""


class Ranks:
    """This process as `rank` of `world`, with `local` its number on this machine.

    alone: the only process; nothing is sent then, and every method does for one what its name says.
    agreed: whether the error that ends this rank ends all of them.
    """

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0):
        self.rank, self.world, self.local = rank, world, local
        self.agreed = False

    @property
    def speaks(self) -> bool:
        """Whether this rank prints the error that ends it: the first one does for all."""
        return self.first or not self.agreed

    @property
    def alone(self) -> bool:
        return self.world == 1

    @property
    def first(self) -> bool:
        """Whether this rank writes the files and speaks."""
        return self.rank == 0

    def agree(self, numbers: Sequence[float], problem: Exception | None) -> list[float]:
        """The sums of each number over the ranks. If any rank has a problem, all raise that of the first that has one.

        Called by all ranks at the same place, with as many numbers.
        """
        if self.alone:
            if problem is not None:
                raise problem
            return list(numbers)
        sums = torch.tensor([*numbers, float(problem is not None)], dtype=torch.float64)
        self._send(dist.all_reduce, sums)
        *totals, troubled = sums.tolist()
        if troubled:
            raise self.blame(next(each for each in self.gather(problem) if each is not None))
        return totals

    def lead(self, work: Callable[[], Result]) -> Result:
        """What `work` returns on the first rank, alone called there, on all; all raise what it raises."""
        if self.alone:
            return work()
        outcome: list[Any] = [None, None]
        if self.first:
            try:
                outcome[0] = work()
            except Exception as error:
                outcome[1] = error
        self._send(dist.broadcast_object_list, outcome, src=0)
        if outcome[1] is not None:
            raise self.blame(outcome[1])
        return outcome[0]

    def do_first(self, work: Callable[[], Any]) -> None:
        """Let the first rank do it; all raise what it raises. The result stays there."""
        self.lead(lambda: (work(), None)[1])

    def blame(self, error: Exception) -> Exception:
        """An error that every rank raises alike, which the first one prints."""
        self.agreed = True
        return error

    def gather(self, value: Any) -> list[Any]:
        """What each rank gives, in their order, on all of them."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.world
        self._send(dist.all_gather_object, values, value)
        return values

    def add_up(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks; they have one dtype and one device, and travel as one."""
        if self.alone:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._send(dist.all_reduce, flat)
        parts = flat.split([tensor.numel() for tensor in tensors])
        torch._foreach_copy_(list(tensors), [p.view(t.shape) for p, t in zip(parts, tensors, strict=True)])

    def copy_from_first(self, tensors: Sequence[Tensor]) -> None:
        """Give each tensor the values that it has on the first rank."""
        if not self.alone:
            with torch.no_grad():
                for tensor in tensors:
                    whole = tensor.detach().contiguous()
                    self._send(dist.broadcast, whole, src=0)
                    tensor.copy_(whole)

    def _send(self, collective: Callable, *arguments: Any, **options: Any) -> None:
        try:
            collective(*arguments, **options)
        except RuntimeError as error:
            raise RankError(
                f"rank {self.rank} has lost the others ({str(error).splitlines()[0][:160]}): what the rank that ended "
                "has printed says why; --resume goes on from the last checkpoint"
            ) from error

    def close(self) -> None:
        """Leave the group; the others are not waited for."""
        if not self.alone and dist.is_initialized():
            dist.destroy_process_group()


def join_ranks(device_name: str, timeout: float) -> Ranks:
    """The ranks that torchrun (or the variables RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT) describe.

    timeout: seconds after which a rank that waits for another gives up. ValueError for variables that make no sense.
    """
    world = _read_number("WORLD_SIZE", 1)
    if world == 1:
        return Ranks()
    rank, local = _read_number("RANK"), _read_number("LOCAL_RANK")
    if missing := [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        raise ValueError(f"WORLD_SIZE is {world}, but {', '.join(missing)} is not set: start the ranks with torchrun")
    on_gpu = device_name != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(local % torch.cuda.device_count())
    limit = datetime.timedelta(seconds=timeout)
    try:
        store, *_ = next(dist.rendezvous("env://", rank, world, timeout=limit))
        if (attempt := os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) != "0" and _is_one_machine(world):
            # PyTorch takes the store for a new one at every restart. With --nproc-per-node alone it is not, and still
            # holds the addresses of ranks that are dead.
            store = dist.PrefixStore(f"attempt {attempt}", store)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=limit)
    except (RuntimeError, ValueError) as error:  # a port in use, a rank that never came
        raise RankError(f"rank {rank} of {world} could not meet the others: {str(error).splitlines()[0]}") from error
    return Ranks(rank, world, local)


def _is_one_machine(world: int) -> bool:
    """Whether torchrun has started all ranks here; only then do they count the same restarts."""
    return os.environ.get("LOCAL_WORLD_SIZE") == str(world)


def _read_number(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    if text is None or not text.isdigit():
        raise ValueError(f"the variable {name} is {text!r}, and must be a number: start the ranks with torchrun")
    return int(text)
