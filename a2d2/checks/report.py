"""The report of `preprocessing/check.py` on one raw dataset: a printed table, and a JSON with more details."""

import shutil
import textwrap
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from a2d2.checks.assumptions import ASSUMPTIONS
from a2d2.checks.check import DIFFERS, NOT_CHECKABLE, OK, Check
from a2d2.checks.facts import BusFacts, FrameFacts
from a2d2.checks.known import BOX_SCENES, MAIN_VIEW
from a2d2.checks.raw_set import RawSet, count_files, list_damaged
from a2d2.checks.verdicts import check_set
from a2d2.frames import RAW_KINDS

_MOST_DAMAGED = 20  # damaged files in the table; the JSON has all
_COUNTS = (*RAW_KINDS, "bus items", "known")


@dataclass(frozen=True)
class Report:
    """The checks of a raw dataset, and the facts that they used."""

    raw: RawSet
    frames: list[FrameFacts]
    buses: list[BusFacts]
    checks: list[Check]

    def list_failed(self) -> list[str]:
        """Names of the checks whose verdict is "differs" and that training depends on."""
        return [check.name for check in self.checks if check.fails]

    def list_counts(self) -> list[dict[str, object]]:
        """One row for each scene and camera: number of files of each kind, of bus items and of known frames; None if
        there are no such items or the number is unknown."""
        items = {facts.scene: len(facts.timestamps) for facts in self.buses}
        known = BOX_SCENES if self.raw.kind == "boxes" else {}
        rows = []
        for (scene, view), counts in count_files(self.raw).items():
            row = {"scene": scene, "view": view} | {kind: counts[kind] for kind in RAW_KINDS}
            of_scene = scene if view == MAIN_VIEW else None
            rows.append(row | {"bus items": items.get(of_scene), "known": known.get(of_scene)})
        return rows

    def describe(self) -> dict:
        """The content of check.json."""
        rows = [
            {
                "name": check.name,
                "assumption": ASSUMPTIONS[check.name].text,
                "section": ASSUMPTIONS[check.name].source,
                "needed": ASSUMPTIONS[check.name].needed,
                "verdict": check.verdict,
                "found": check.found,
                "details": check.details,
            }
            for check in self.checks
        ]
        report = {
            "data": str(self.raw.root),
            "set": self.raw.kind,
            "frames": len(self.raw.index),
            "every": self.raw.every,
            "failed": self.list_failed(),
            "checks": rows,
            "counts": self.list_counts(),
            "damaged": list_damaged(self.raw, self.frames, self.buses),
        }
        return _make_plain(report)

    def format(self, width: int | None = None) -> str:
        """The printed report: numbers of files, one row for each check, the damaged files. `width`: in characters."""
        width = width or max(100, min(160, shutil.get_terminal_size((120, 24)).columns))
        lines = [f"{self.raw.root}: {len(self.raw.index):,} frames, checked as the {self.raw.kind} set", ""]
        lines.append(f"{'scene':<17}{'camera':<14}" + "".join(f"{name:>13}" for name in _COUNTS))
        for row in self.list_counts():
            numbers = "".join(f"{'-' if row[name] is None else row[name]:>13}" for name in _COUNTS)
            lines.append(f"{row['scene']:<17}{row['view']:<14}{numbers}")
        lines += ["", *_format_checks(self.checks, width)]
        damaged = list_damaged(self.raw, self.frames, self.buses)
        if damaged:
            lines += ["", f"damaged ({len(damaged):,}):"]
            lines += [f"  {row['file']}: {row['reason']}" for row in damaged[:_MOST_DAMAGED]]
        if len(damaged) > _MOST_DAMAGED:
            lines.append(f"  and {len(damaged) - _MOST_DAMAGED:,} more, in the JSON")
        return "\n".join(lines)

    def summarise(self) -> str:
        """One line: number of checks of each verdict, and names of the failed checks that training depends on."""
        verdicts = Counter(check.verdict for check in self.checks)
        text = f"{verdicts[OK]} ok, {verdicts[DIFFERS]} differ, {verdicts[NOT_CHECKABLE]} not checkable"
        failed = self.list_failed()
        return text + (f"; training depends on {', '.join(failed)}" if failed else "")


def build_report(raw: RawSet, facts: Iterable[FrameFacts | BusFacts]) -> Report:
    """Check the facts that reading the units gave; they may be in any order."""
    facts = list(facts)
    frames = sorted((found for found in facts if isinstance(found, FrameFacts)), key=lambda found: found.frame)
    buses = sorted((found for found in facts if isinstance(found, BusFacts)), key=lambda found: found.scene)
    return Report(raw, frames, buses, check_set(raw, frames, buses))


def _make_plain(value: object) -> object:
    """A value that JSON can hold: NaN and infinity become strings."""
    if isinstance(value, dict):
        return {str(key): _make_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_make_plain(item) for item in value]
    if isinstance(value, float) and not np.isfinite(value):
        return str(value)
    return value


def _format_checks(checks: list[Check], width: int) -> Iterator[str]:
    verdict_width, text_width = len(NOT_CHECKABLE) + 2, 46
    yield f"{'verdict':<{verdict_width}}{'assumption (* training depends on it)':<{text_width}}found"
    for check in checks:
        assumption = ASSUMPTIONS[check.name]
        mark = "* " if assumption.needed else "  "
        texts = textwrap.wrap(mark + assumption.text, text_width - 2, subsequent_indent="  ")
        found = textwrap.wrap(check.found, width - verdict_width - text_width)
        for number in range(max(len(texts), len(found))):
            columns = ([check.verdict], texts, found)
            verdict, text, rest = (column[number] if number < len(column) else "" for column in columns)
            yield f"{verdict:<{verdict_width}}{text:<{text_width}}{rest}".rstrip()
