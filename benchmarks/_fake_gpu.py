"""A GPU that is not there: networks and training steps on tensors without content, by the rules for a GPU."""

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from tasks.task import Task
from training.cycle import GradientRows, Reading

# of operations on a GPU: what launches no kernel, because it only describes memory anew or makes none
FREE = {
    "aten::_unsafe_view", "aten::alias", "aten::as_strided", "aten::chunk", "aten::detach", "aten::empty",
    "aten::empty_like", "aten::empty_strided", "aten::expand", "aten::lift_fresh", "aten::new_empty",
    "aten::new_empty_strided", "aten::permute", "aten::select", "aten::slice", "aten::split", "aten::split_with_sizes",
    "aten::squeeze", "aten::t", "aten::transpose", "aten::unbind", "aten::unsqueeze", "aten::view",
    "aten::_reshape_alias", "aten::unfold", "aten::is_same_size", "aten::detach_", "aten::resize_", "prim::device",
}  # fmt: skip
# what the host has to wait for the GPU for, because a shape or a value depends on what is there computed
WAITING = {
    "aten::nonzero", "aten::_local_scalar_dense", "aten::masked_select", "aten::unique_dim", "aten::_unique2",
    "aten::bincount", "aten::is_nonzero", "aten::equal", "aten::repeat_interleave",
}  # fmt: skip


@contextlib.contextmanager
def autocast_as_on_gpu(enabled: bool) -> Iterator[None]:
    """What torch.autocast("cuda", torch.bfloat16) does, and refuses to do where there is no GPU."""
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    torch.set_autocast_enabled("cuda", enabled)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])


class CountKernels(TorchDispatchMode):
    """Counts the operations on tensors without content, and the moments in which the host would wait for a GPU to know
    one of their values. Enter it inside of FakeTensorMode; real tensors are those of the host, and are not counted.

    What the host reads is 1, as there are no values. An operation on a list of tensors (foreach, fused) counts once: it
    is some kernels, but not one for each. `every`: count real tensors as well, to compare code that cannot run without
    values.
    """

    def __init__(self, every: bool = False):
        super().__init__()
        self.every = every
        self.kernels: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __enter__(self):
        def read(tensor):
            self.waits["aten::tolist"] += 1
            return np.ones(tensor.shape).tolist()

        self._read = patch.object(FakeTensor, "tolist", read)
        self._read.start()
        return super().__enter__()

    def __exit__(self, *exception):
        self._read.stop()
        return super().__exit__(*exception)

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        options = options or {}
        name = operation.name()
        short = name.partition(".")[0]
        counted = any(map(self._is_counted, tree_leaves((arguments, options))))
        if counted and (short in WAITING or _picks_by_mask(short, arguments)):
            self.waits[name] += 1
            if short == "aten::_local_scalar_dense" and not self.every:
                return 1.0
        result = operation(*arguments, **options)
        if short not in FREE and (counted or any(map(self._is_counted, tree_leaves(result)))):
            self.kernels[name] += 1
        return result

    def _is_counted(self, leaf: Any) -> bool:
        return isinstance(leaf, FakeTensor) or (self.every and isinstance(leaf, Tensor))


def _picks_by_mask(name: str, arguments: Any) -> bool:
    if name not in ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index"):
        return False
    return any(isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(arguments[1]))


def make_batch(tasks: Mapping[str, Task], size: tuple[int, int], count: int) -> dict[str, Any]:
    """A micro-batch of `count` frames with blank labels of all tasks, of (width, height) `size`, on the CPU."""
    targets = {
        name: task.collate([task.prepare_loss(task.blank(size)) for _ in range(count)]) for name, task in tasks.items()
    }
    return {
        "image": torch.zeros(count, 3, size[1], size[0], dtype=torch.uint8),
        "targets": targets,
        "rows": {name: torch.arange(count) for name in tasks},
        "counts": {name: torch.ones(count, dtype=torch.int64) for name in tasks},
        "frame": ["none"] * count,
        "seed": 0,
    }


def fake(value: Any, mode: Any) -> Any:
    """The same structure with tensors without content."""
    return tree_map(lambda leaf: mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, value)


def combine_evenly(number: int, reading: Reading, rows: GradientRows, measures: dict) -> dict[str, float]:
    """In place of CycleUpdate._combine, which reads the Gramian that tensors without content lack: all weights 1."""
    rows.combine(dict.fromkeys(rows.rows, 1.0), reading.reached)
    return dict.fromkeys(rows.rows, 1.0) | {"square": 0.0}
