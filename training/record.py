"""The record of a run: which frames are in which of its subsets, and what its label statistics are.

It is made when a run starts for the first time, and is a fact from then on: a run that is resumed goes on with these
frames and labels, and an evaluation asks it which frames were trained on, however the data have changed since. Frames
are named "scene/view/id".
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

RECORD_FORMAT = 1


@dataclass(frozen=True)
class Record:
    """subsets: "train", "val" and "test" -> names of frames, in order.
    labels: task -> names of the frames, of any subset, that had a label of it.
    label_statistics: task -> its label statistics.
    assignment: hash of the labels that are trained on, see training/sampling.py.
    identity: fingerprints of the preprocessed datasets: size, cameras, and the options the labels were made with.
    inherited: names of frames that the run this one was initialised from, or its teachers, were trained on; None if
        that is unknown.
    repeat_factors: task -> how often its frames are drawn in comparison, in the order of its assignment; only of tasks
        that draw rare frames more often.
    pseudo: fingerprints of the pseudo-labels that are learned, of each folder one of which teachers have made it for
        which frames, and, behind a hyphen, one of its files; runs that were begun before have the first alone.
    """

    subsets: Mapping[str, Sequence[str]]
    labels: Mapping[str, Sequence[str]]
    label_statistics: Mapping[str, Any]
    assignment: str
    identity: Sequence[str] = ()
    inherited: Sequence[str] | None = field(default=())
    repeat_factors: Mapping[str, Sequence[float]] = field(default_factory=dict)
    pseudo: Sequence[str] = ()

    @property
    def trained(self) -> frozenset[str]:
        """The names of all frames that may have been trained on, as far as they are known."""
        return frozenset(self.subsets["train"]) | frozenset(self.inherited or ())

    @property
    def digest(self) -> str:
        """A fingerprint of the whole record."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_dict(self, with_labels: bool = True) -> dict[str, Any]:
        """The record as JSON has it; `from_dict` makes a Record of it again, with no labels where they are left out."""
        labels = {name: group_names(frames) for name, frames in self.labels.items()} if with_labels else {}
        factors = {name: list(values) for name, values in self.repeat_factors.items()} if with_labels else {}
        return (
            {
                "format": RECORD_FORMAT,
                "subsets": {name: group_names(frames) for name, frames in self.subsets.items()},
                "labels": labels,
                "label_statistics": dict(self.label_statistics),
                "assignment": self.assignment,
                "identity": list(self.identity),
                "inherited": None if self.inherited is None else group_names(self.inherited),
            }
            | ({"repeat_factors": factors} if factors else {})
            | ({"pseudo": list(self.pseudo)} if self.pseudo else {})
        )

    def to_json(self) -> str:
        """The record as a text, the same for equal records."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "Record":
        """ValueError if this is no record, or one of another format."""
        try:
            if content["format"] != RECORD_FORMAT:
                raise ValueError(f"format {content['format']}, and this version of the code reads {RECORD_FORMAT}")
            inherited = content["inherited"]
            return cls(
                {name: ungroup_names(groups) for name, groups in content["subsets"].items()},
                {name: ungroup_names(groups) for name, groups in content["labels"].items()},
                content["label_statistics"],
                content["assignment"],
                tuple(content["identity"]),
                None if inherited is None else ungroup_names(inherited),
                content.get("repeat_factors", {}),
                tuple(content.get("pseudo", ())),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"is no record of a run ({error!r})") from error

    @classmethod
    def from_json(cls, text: str) -> "Record":
        return cls.from_dict(json.loads(text))


def identify_pseudo(fingerprint: str) -> str:
    """The part of a fingerprint of pseudo-labels that says which teachers have made them for which frames."""
    return fingerprint.partition("-")[0]


def are_same_pseudo(before: Sequence[str], now: Sequence[str]) -> bool:
    """Whether pseudo-labels are those that were recorded, as far as the record says so."""
    return len(before) == len(now) and all(
        old == (new if "-" in old else identify_pseudo(new)) for old, new in zip(before, now, strict=True)
    )


def group_names(names: Iterable[str]) -> dict[str, list[str]]:
    """Names by what stands before the last slash: a third of the length for many frames of few scenes."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folder, _, identity = name.rpartition("/")
        groups[folder].append(identity)
    return dict(groups)


def ungroup_names(groups: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    return tuple(f"{folder}/{identity}" for folder, identities in groups.items() for identity in identities)
