"""What a run is on disk: its folder, its record, its log, its checkpoints, its best weights, and the state they hold.

runs/<name>/config.yaml         resolved config; train.py takes it again
            record.json         the frames of each subset, their labels and the label statistics, from the first start
            assignment.json     which labels are trained on; data.labels={file: ...} takes it, edited or not
            environment.json    commit, versions, device, command
            metrics.jsonl       one JSON line per event
            tensorboard/
            checkpoints/        to resume from
            best.safetensors    the weights with the best validation score
            best.json           its scores
            owner.json          who trains in it now; only while somebody does
"""

import dataclasses
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from training.balancing import Balancer, Normaliser
from training.checkpoint import load_newest_checkpoint, save_checkpoint, save_weights
from training.config import Config, config_to_dict, save_config
from training.distributed import Ranks
from training.ema import EmaWeights
from training.files import whole_file, write_json
from training.log import RunLog, write_environment
from training.owner import Owner
from training.record import Record, identify_pseudo
from training.updates import Update


@dataclass
class Progress:
    """How far a run has come. `step`: steps done; `best_skill`: of the best validation so far, None before the first
    score; `validated`: whether the validation that was due at `step` is done, so that a run stopped in it repeats it;
    `events`: lines in the log.
    """

    step: int = 0
    best_skill: float | None = None
    validated: bool = True
    events: int = 0

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
    balance: Balancer
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
    """The folder of a run, owned by this process until `close`.

    Making one reads what is there: `record`, None for a run that starts anew, and `progress`, of the newest checkpoint.
    `start` is the first to write.

    Of several ranks the first alone reads and writes, and the others are told; `log` is None on these. All ranks call
    `start`, `save`, `save_best` and `log_event` at the same places, and all raise what goes wrong on the first.

    ValueError for a folder that holds a run and no `resume`, for a run that was started with another config or an older
    version of this code, and for a folder that another process owns.
    """

    def __init__(self, folder: Path, config: Config, resume: bool, ranks: Ranks | None = None):
        self.folder, self.config, self.ranks = folder, config, ranks or Ranks()
        self.log: RunLog | None = None
        self.record: Record | None = None
        self.assignment: str | None = None
        self._checkpoint: dict[str, Any] | None = None
        self._owner: Owner | None = None
        try:
            found = self.ranks.lead(lambda: self._open(resume))
        except BaseException:
            self.close()
            raise
        self.record, self.assignment, self._checkpoint = found

    def _open(self, resume: bool) -> tuple[Record | None, str | None, dict[str, Any] | None]:
        self._owner = Owner(self.folder)
        if not (self.folder / "config.yaml").is_file():
            if resume:
                print(f"{self.folder} holds no run yet: it starts anew")
            return None, None, None
        if not resume:
            raise ValueError(
                f"{self.folder} holds a run already: resume it with --resume, or name another folder with --run"
            )
        _check_config(self.folder, self.config)
        found = load_newest_checkpoint(self._checkpoints)
        if found is not None:
            self._checkpoint = found[1]
        try:
            assignment = (self.folder / "assignment.json").read_text(encoding="utf-8")
        except FileNotFoundError:
            assignment = None
        return self._read_record(), assignment, self._checkpoint

    def _read_record(self) -> Record:
        path = self.folder / "record.json"
        saved = self._checkpoint and self._checkpoint.get("record")
        try:
            record = Record.from_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            if not saved:
                raise ValueError(
                    f"{self.folder} has no record.json, so nothing says which frames it was trained on: finish the run "
                    "with the version that began it, or start another with --run"
                ) from None
            record = Record.from_json(saved["text"])
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); put it back, or start another run with --run") from error
        if saved and saved["text"] != record.to_json():
            raise ValueError(
                f"{path} and the newest checkpoint do not agree on the frames and labels of this run: delete the one "
                "that was changed, or start another run with --run"
            )
        return record

    @property
    def _checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def progress(self) -> Progress:
        """How far the run has come on disk."""
        return Progress(**self._checkpoint["progress"]) if self._checkpoint else Progress()

    def start(self, record: Record, assignment: str, state: RunState) -> None:
        """Write what a new run starts with, or load the newest checkpoint into `state`; the log is cut there.

        assignment: the text of assignment.json.
        """
        self.ranks.do_first(lambda: self._write_start(record, assignment))
        self.record = record
        if self._checkpoint is not None:
            saved = {name: part for name, part in self._checkpoint.items() if name != "record"}
            self._checkpoint = None  # it holds as much memory as the network and its optimizer
            state.load_state_dict(saved)
        self.ranks.do_first(lambda: self._open_log(state.progress))

    def _write_start(self, record: Record, assignment: str) -> None:
        if self.record is None:
            for name, text in (("record.json", record.to_json()), ("assignment.json", assignment)):
                with whole_file(self.folder / name) as file:
                    file.write(text.encode("utf-8"))
            save_config(self.config, self.folder / "config.yaml")
        if self._checkpoint is None:
            write_environment(self.folder, sys.argv)

    def _open_log(self, progress: Progress) -> None:
        wandb = self.config.log.wandb.model_dump() if self.config.log.wandb is not None else None
        self.log = RunLog(self.folder, self.config.log.tensorboard, wandb)
        self.log.truncate_after(progress.step, progress.events)

    def log_event(self, kind: str, step: int, **values: Any) -> None:
        """A line in the log, see RunLog.event."""

        def write() -> None:
            assert self.log is not None, "start the run first"
            self.log.event(kind, step, **values)

        self.ranks.do_first(write)

    def save(self, state: RunState, after_error: bool = False) -> None:
        """Write a checkpoint of the current step; all ranks wait for it. `after_error`: others may not be there any
        more, so ranks only wait if all have the same error."""

        def write() -> None:
            assert self.log is not None and self.record is not None, "start the run first"
            state.progress.events = self.log.events
            content = state.state_dict() | {"record": {"text": self.record.to_json()}}
            save_checkpoint(self._checkpoints, state.progress.step, content, self.config.train.keep_checkpoints)

        if not after_error or self.ranks.agreed:
            self.ranks.do_first(write)
        elif self.ranks.first:
            write()

    def save_best(self, state: RunState, header: dict[str, Any], scores: dict[str, Any]) -> None:
        """Write the validated network as best.safetensors, with `header` for rebuilding it, and its scores."""
        step, skill = state.progress.step, state.progress.best_skill

        def write() -> None:
            save_weights(self.folder / "best.safetensors", state.validated_net.state_dict(), header | {"step": step})
            about = {"step": step, "skill": skill, "subset": "val", "protocol": header["protocol"]}
            write_json(self.folder / "best.json", about | {"scores": scores})

        self.ranks.do_first(write)

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
        if self._owner is not None:
            self._owner.release()


def _check_config(folder: Path, config: Config) -> None:
    path = folder / "config.yaml"
    try:
        before = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}); start another run with --run") from error
    differing = sorted(_find_differences(before, config_to_dict(config)))
    if differing:
        advice = ""
        if any(difference.startswith("train.steps ") for difference in differing):
            advice = (
                ". The learning rate follows a schedule over all steps, so more steps are another run: start it from "
                f"these weights, with --run FOLDER train.init={folder}"
            )
        raise ValueError(
            f"{folder} was begun with another config, so it cannot be resumed: {'; '.join(differing)}{advice}"
        )


# what cannot change what is computed; that a moved dataset, or folder of pseudo-labels, is the same one is checked
# against the record
_FREE_KEYS = {
    "run",
    "data.roots",
    "data.pseudo.roots",
    "data.workers",
    "train.device",
    "train.timeout",
    "train.save_every",
    "train.keep_checkpoints",
    "evaluate.micro_batch",
    "log",
}


def find_recipe(folder: Path, record: Record | None) -> tuple[str, int] | None:
    """A fingerprint of a run's config without its seed and what cannot change what is computed, and of the frames,
    labels and pseudo-labels that it has recorded; and the seed: runs that differ by the seed alone have the same
    fingerprint. None where the folder has no readable config, or no record says what was trained on."""
    try:
        content = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError):
        return None
    if record is None or not isinstance(content, dict) or not isinstance(content.get("seed"), int):
        return None
    kept = {key: value for key, value in list_deciding_options(content).items() if key != "seed"}
    frames = {key: record.to_dict(with_labels=False)[key] for key in ("subsets", "assignment", "identity", "inherited")}
    if record.pseudo:
        frames["pseudo"] = [identify_pseudo(each) for each in record.pseudo]
    digest = hashlib.sha256(json.dumps([kept, frames], sort_keys=True, default=str).encode()).hexdigest()[:16]
    return digest, content["seed"]


def list_deciding_options(content: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a config that can change what is computed: "block.option" -> value."""
    config = flatten_config(content)
    return {key: config[key] for key in config if not any(f"{key}.".startswith(f"{name}.") for name in _FREE_KEYS)}


def flatten_config(content: Any, key: str = "") -> dict[str, Any]:
    """A config as one dict: "block.option" -> value."""
    if not (isinstance(content, dict) and content):
        return {key: content}
    parts = [flatten_config(value, f"{key}.{name}".lstrip(".")) for name, value in content.items()]
    return {name: value for part in parts for name, value in part.items()}


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
