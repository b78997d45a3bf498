"""What a run is on disk: its folder, its config, its log, its checkpoints, its best weights, and the state they hold.

runs/<name>/config.yaml         resolved config; train.py takes it again
            environment.json    commit, versions, device, command
            metrics.jsonl       one JSON line per event
            tensorboard/
            checkpoints/        to resume from
            best.safetensors    the weights with the best validation score
            best.json           its scores
"""

import dataclasses
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from training.balancing import LossWeights, Normaliser
from training.checkpoint import load_newest_checkpoint, save_checkpoint, save_weights, write_json
from training.config import Config, config_to_dict, save_config
from training.ema import EmaWeights
from training.log import RunLog, write_environment
from training.updates import Update


@dataclass
class Progress:
    """How far a run has come. `step`: steps done; `best_skill`: of the best validation so far, None before the first
    score; `validated`: whether the validation that was due at `step` is done, so that a run stopped in it repeats it.
    """

    step: int = 0
    best_skill: float | None = None
    validated: bool = True

    def state_dict(self) -> dict[str, int | float | bool | None]:
        return dataclasses.asdict(self)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, value)


@dataclass
class RunState:
    """All that changes while a run trains.

    A checkpoint holds the `state_dict` of every field, so a new stateful part is a new field here and nothing else. A
    field that is None has no state.
    """

    net: nn.Module
    ema: EmaWeights | None
    update: Update
    balance: LossWeights
    normaliser: Normaliser
    progress: Progress = field(default_factory=Progress)

    @property
    def validated_net(self) -> nn.Module:
        """The network that is validated and kept: the EMA where there is one."""
        return self.net if self.ema is None else self.ema.net

    def state_dict(self) -> dict[str, Any]:
        parts = {each.name: getattr(self, each.name) for each in dataclasses.fields(self)}
        return {name: None if part is None else part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore every field. ValueError where the state has other fields than this run."""
        fields = {each.name for each in dataclasses.fields(self)}
        if state.keys() != fields:
            raise ValueError(
                f"the checkpoint contains {', '.join(sorted(state))}, and this version of the code needs "
                f"{', '.join(sorted(fields))}: finish the run with the version that began it, or start another "
                "with --run"
            )
        for name, saved in state.items():
            part = getattr(self, name)
            if part is not None:
                part.load_state_dict(saved)


class Run:
    """The folder of a run. Making one creates the folder, or checks that the run in it can be resumed with this config.

    ValueError, before anything is written, for a folder that holds a run and no `resume`, for a run that was begun with
    another config, and for one that an older version of this code began.
    """

    def __init__(self, folder: Path, config: Config, resume: bool):
        self.folder, self.config = folder, config
        self._checkpoint = load_newest_checkpoint(self._checkpoints) if resume else None
        if (folder / "config.yaml").is_file():
            _check_resumable(folder, config, resume)
        else:
            save_config(config, folder / "config.yaml")
        wandb = config.log.wandb.model_dump() if config.log.wandb is not None else None
        self.log = RunLog(folder, config.log.tensorboard, wandb)

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def restore(self, state: RunState) -> None:
        """Load the newest checkpoint into `state` and cut the log there; a run without one starts at step 0."""
        if self._checkpoint is None:
            write_environment(self.folder, sys.argv)
            return
        _, saved = self._checkpoint
        self._checkpoint = None  # it holds as much memory as the network and its optimizer
        state.load_state_dict(saved)
        self.log.truncate_after(state.progress.step)

    def save(self, state: RunState) -> None:
        """Write a checkpoint of the current step."""
        keep = self.config.train.keep_checkpoints
        save_checkpoint(self._checkpoints, state.progress.step, state.state_dict(), keep)

    def save_best(self, state: RunState, header: dict[str, Any], scores: dict[str, Any]) -> None:
        """Write the validated network as best.safetensors, with `header` for rebuilding it, and its scores."""
        step, skill = state.progress.step, state.progress.best_skill
        save_weights(self.folder / "best.safetensors", state.validated_net.state_dict(), header | {"step": step})
        write_json(self.folder / "best.json", {"step": step, "skill": skill, "scores": scores})

    def close(self) -> None:
        self.log.close()


def _check_resumable(folder: Path, config: Config, resume: bool) -> None:
    if not resume:
        raise ValueError(f"{folder} holds a run already: resume it with --resume, or name another folder with --run")
    before, now = yaml.safe_load((folder / "config.yaml").read_text()), config_to_dict(config)
    differing = sorted(_find_differences(before, now))
    if differing:
        raise ValueError(f"{folder} was begun with another config, so it cannot be resumed: {'; '.join(differing)}")


_FREE_KEYS = {"data.workers", "train.device", "train.keep_checkpoints", "log"}  # they do not change what is computed


def _find_differences(before: object, now: object, key: str = "") -> list[str]:
    if key in _FREE_KEYS or before == now:
        return []
    if isinstance(before, dict) and isinstance(now, dict):
        names = {*before, *now}
        return [
            difference
            for name in names
            for difference in _find_differences(before.get(name), now.get(name), f"{key}.{name}".lstrip("."))
        ]
    return [f"{key} was {before}, now {now}"]
