"""What is done to parts of a network for training: freeze, compile, compute twice; and what ranks cannot share."""

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def find_part(net: Any, name: str) -> nn.Module | None:
    """The part called "encoder", "neck" or "heads.<task>"; None if this network has none of that name."""
    return dict(net.named_modules()).get(name)


def freeze_parts(net: Any, names: Sequence[str]) -> None:
    """Let the parameters of these parts have no gradients, so that nothing changes them. ValueError for a part that
    this network lacks."""
    for name in names:
        part = find_part(net, name)
        if part is None:
            raise ValueError(f"train.freeze names {name}, and this kind of network has none: leave it out")
        part.requires_grad_(False)


def start_training(net: Any, frozen: Sequence[str]) -> None:
    """Training mode, but for the frozen parts: they draw nothing and keep their statistics."""
    net.train()
    for name in frozen:
        part = find_part(net, name)
        assert part is not None, name
        part.eval()


def check_ranks(net: Any, world: int) -> None:
    """ValueError if layers take statistics over the frames of one rank, so that several ranks would be another run."""
    if world == 1:
        return
    net.train()
    normalised = [name for name, module in net.named_modules() if isinstance(module, _BatchNorm) and module.training]
    if normalised:
        raise ValueError(
            f"{normalised[0]} normalises by the statistics of its micro-batch, and each of {world} ranks would gather "
            "statistics of its own: take model.encoder.norm=frozen or group, or train on one rank"
        )


def compile_parts(net: Any, backend: str = "inductor") -> None:
    """Compile encoder, neck and heads in place; names of tensors stay as they are."""
    for part in (net.encoder, getattr(net, "neck", None), *net.heads.values()):
        if part is not None:
            part.compile(backend=backend)


def recompute_neck(net: Any) -> None:
    """Let the neck keep less for the backward pass; ValueError if it cannot."""
    neck = getattr(net, "neck", None)
    if not hasattr(neck, "recompute"):
        raise ValueError("train.recompute is for the neck of model.kind=multitask, and this network has none")
    neck.recompute = True
