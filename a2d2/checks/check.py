"""One check of `preprocessing/check.py` and its verdict, which is a line of the printed table."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from a2d2.checks.assumptions import ASSUMPTIONS

OK, DIFFERS, NOT_CHECKABLE = "ok", "differs", "not checkable"


@dataclass(frozen=True)
class Check:
    """The verdict on an assumption. `found`: what was found, for the table; `details`: more numbers, for the JSON."""

    name: str
    verdict: str
    found: str
    details: dict = field(default_factory=dict)

    @property
    def fails(self) -> bool:
        """Whether the dataset must not be used for training."""
        return self.verdict == DIFFERS and ASSUMPTIONS[self.name].needed


def make_check(name: str, holds: bool, found: str, /, **details: object) -> Check:
    return Check(name, OK if holds else DIFFERS, found, details)


def skip_check(name: str, reason: str, /, **details: object) -> Check:
    return Check(name, NOT_CHECKABLE, reason, details)


def format_some(names: Iterable[object], limit: int = 3) -> str:
    names = [str(name) for name in names]
    rest = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + rest


def format_counts(counts: dict[str, int], limit: int = 5) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return format_some((f"{name} {count:,}" for name, count in ordered), limit)


def compare_scenes(name: str, found: set[str], known: Iterable[str]) -> Check:
    known = set(known)
    absent, foreign = sorted(known - found), sorted(found - known)
    details = {"absent": absent, "foreign": foreign}
    if not found & known:
        return skip_check(name, f"{len(found)} scenes, none of A2D2's", **details)
    text = f"{len(found & known)} of {len(known)} scenes"
    if foreign:
        return make_check(name, False, f"{text}, and {len(foreign)} unknown ones: {format_some(foreign)}", **details)
    if absent:
        return skip_check(name, f"{text}; not in this dataset: {format_some(absent, 20)}", **details)
    return make_check(name, True, text, **details)
