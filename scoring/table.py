"""Scores as tables: text, Markdown, LaTeX and CSV."""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scoring.compare import DELTA_M, average_skills

Scores = Mapping[str, Mapping[str, Any]]
COST = ("M parameters", "GFLOP", "ms a frame", "frames/s")
MOST_PAIRS = 24  # rows of differences that are printed; the JSON has all


def show(value: float | None) -> str:
    """Four digits, or - for nothing."""
    return "-" if value is None else f"{value:.4g}"


def show_interval(interval: Sequence[float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.4g} .. {interval[1]:.4g}"


def list_skilled(scores: Scores) -> tuple[str, ...]:
    """The tasks that have a skill."""
    return tuple(task for task, score in scores.items() if score["skill"] is not None)


def is_unknown(scores: Scores) -> bool:
    """Whether the run may have been trained on the frames it is scored on."""
    return any(score.get("trained_frames") == "unknown" for score in scores.values())


def layout(header: Sequence[str], rows: Sequence[Sequence[str]], markdown: bool = False) -> list[str]:
    """Lines of a table with aligned columns."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [header, *rows]]
    if markdown:
        padded.insert(1, ["-" * width for width in widths])
        return ["| " + " | ".join(row) + " |" for row in padded]
    return ["  ".join(row).rstrip() for row in padded]


def collect_rows(
    results: Mapping[str, Scores], costs: Mapping[str, Mapping[str, Any] | None] | None = None
) -> tuple[list[str], list[list[str]], list[str]]:
    """The header and the rows of a table, one for each run and task and one for the mean skill of each run; and notes
    on what cannot be compared, which belong to every form of the table."""
    rows = [score for scores in results.values() for score in scores.values()]
    with_interval = any("interval" in score for score in rows)
    with_cost = any((costs or {}).values())
    header = ["run", "task", "metric", "score", *["95 % interval"] * with_interval, "constant", "skill", "frames"]
    header += list(COST) * with_cost
    lines, notes = [], []
    for run, scores in results.items():
        unknown = is_unknown(scores)
        shown = f"{run}*" if unknown else run
        for task, score in scores.items():
            metric = f"{score['headline']} ({score['better']} is better{', ' if score['unit'] else ''}{score['unit']})"
            between = [show_interval(score.get("interval"))] * with_interval
            values = [show(score["score"]), *between, show(score["constant"]), show(score["skill"])]
            lines.append([shown, task, metric, *values, str(score["frames"]), *[""] * len(COST) * with_cost])
            notes += _explain_row(run, task, score)
        skilled = list_skilled(scores)
        named = f"mean skill of {len(skilled)} task{'s' * (len(skilled) != 1)}"
        mean = average_skills(score["skill"] for score in scores.values())
        cost = _show_cost((costs or {}).get(run)) if with_cost else []
        lines.append([shown, "all", named, "", *[""] * with_interval, "", show(mean), "", *cost])
        if unknown:
            notes.append(f"* {run}: it is unknown whether it was trained on these frames")
    if len({list_skilled(scores) for scores in results.values()}) > 1:
        notes.append("the mean skills are over different tasks, so they cannot be compared")
    constants: dict[str, set[float]] = {}
    for task, score in ((task, score) for scores in results.values() for task, score in scores.items()):
        constants.setdefault(task, set()).update({score["constant"]} - {None})
    if differing := [task for task, values in constants.items() if len(values) > 1]:
        notes.append(
            f"{', '.join(differing)}: the runs have other constant baselines, found on other training labels or under "
            "another protocol, so compare their scores and not their skills (the comparisons of runs use one for all)"
        )
    if with_cost:
        measured = next(cost for cost in (costs or {}).values() if cost)
        notes.append(
            f"cost: of the network with all its heads on {measured['device']}; ms a frame is the median for one frame, "
            f"frames/s in batches of {measured['batch']}; a FLOP is one multiplication or one addition"
        )
    return header, lines, notes


def format_table(
    results: Mapping[str, Scores], markdown: bool = False, costs: Mapping[str, Mapping[str, Any] | None] | None = None
) -> str:
    """The table as text, then the notes."""
    header, lines, notes = collect_rows(results, costs)
    return "\n".join([*layout(header, lines, markdown), *([""] if markdown and notes else []), *notes])


def _show_cost(cost: Mapping[str, Any] | None) -> list[str]:
    if cost is None:
        return ["-"] * len(COST)
    values = (cost["parameters"] / 1e6, cost["flops"] / 1e9, cost["latency"] * 1e3, cost["rate"])
    return [show(value) for value in values]


def _explain_row(run: str, task: str, score: Mapping[str, Any]) -> list[str]:
    if score.get("conflict"):
        return [f"{run}, {task}: not scored, because {score['conflict']}"]
    if score["skill"] is None and score["score"] is not None and score["constant"] is not None:
        return [
            f"{run}, {task}: no skill, because the error of the constant baseline ({score['constant']:.4g}) is at or "
            "below the resolution of the labels"
        ]
    if score["score"] is not None and score["constant"] is None:
        return [f"{run}, {task}: no skill, because its constant baseline is unknown"]
    return []


def format_details(results: Mapping[str, Scores]) -> str:
    """All metrics, one a line, beside those of the constant baseline."""
    rows = [
        [run, task, name, show(value), show(score.get("baseline_metrics", {}).get(name))]
        for run, scores in results.items()
        for task, score in scores.items()
        for name, value in score["metrics"].items()
    ]
    return "\n".join(layout(["run", "task", "metric", "score", "constant"], rows))


@dataclass(frozen=True)
class Table:
    """A table of texts with its title, and the notes that belong under it."""

    title: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


def list_tables(comparison: Mapping[str, Any]) -> list[Table]:
    """Groups of seeds, the comparison with the baselines and differences of pairs, as far as there are any."""
    tables = [
        _list_seeds(comparison.get("seeds") or {}),
        _list_baseline(comparison.get("baseline") or {"baselines": [], "rows": {}}),
        _list_pairs(comparison.get("pairs") or []),
    ]
    return [table for table in tables if table.rows]


def _list_seeds(seeds: Mapping[str, Any]) -> Table:
    rows = [
        [name, str(len(one["runs"])), task, show(one["mean"]), show(one["spread"]), " ".join(map(show, one["scores"]))]
        for name, tasks in seeds.items()
        for task, one in tasks.items()
    ]
    header = ["runs like", "runs", "task", "mean", "spread", "scores"]
    notes = ["runs that differ by their seed alone; spread: the standard deviation between them (n - 1)"]
    return Table("Seeds", header, rows, notes)


def _list_baseline(baseline: Mapping[str, Any]) -> Table:
    tasks = list(dict.fromkeys(task for row in baseline["rows"].values() for task in row["tasks"]))
    header = ["run", "Delta-m %", "95 % interval", *(f"without {task}" for task in tasks)]
    header += [*(f"{task} %" for task in tasks), "skill - baseline's", "95 % interval"]
    rows = [
        [
            run,
            show(row["delta_m"]),
            show_interval(row["interval"]),
            *(show(row["without"].get(task)) for task in tasks),
            *(show(row["terms"].get(task)) for task in tasks),
            show(row["skill_difference"]),
            show_interval(row["skill_interval"]),
        ]
        for run, row in baseline["rows"].items()
    ]
    named = ", ".join(baseline["baselines"])
    notes = [
        f"baseline: {named}; {DELTA_M}",
        "skill - baseline's: the difference of mean skills over the tasks that both have, which a score near 0 does "
        "not rule as it rules Delta-m",
    ]
    return Table(f"Against {named}", header, rows, notes)


def _list_pairs(pairs: Sequence[Mapping[str, Any]]) -> Table:
    several = any(row["probability"] is not None for row in pairs)
    header = ["A", "B", "task", "A - B", "95 % interval", *["P(A > B)"] * several]
    rows = [
        [row["a"], row["b"], row["task"], show(row["difference"]), show_interval(row["interval"])]
        + [show(row["probability"])] * several
        for row in pairs
    ]
    notes = ["A - B: difference of scores, of mean skills in the rows of all; both on the same draws"]
    if several:
        notes.append("P(A > B): the share of pairs of a run of A and one of B in which that of A is better")
    return Table("Differences", header, rows, notes)


def format_comparison(comparison: Mapping[str, Any], markdown: bool = False) -> str:
    """The tables of list_tables as text; more than MOST_PAIRS differences are only counted."""
    pairs = comparison.get("pairs", [])
    many = len(pairs) > MOST_PAIRS
    shown = {**comparison, "pairs": []} if many else comparison
    blocks = [
        [*layout(table.header, table.rows, markdown), *([""] if markdown else []), *table.notes]
        for table in list_tables(shown)
    ]
    if many:
        blocks.append([f"{len(pairs)} differences of pairs of runs are in the JSON (--output)"])
    return "\n\n".join("\n".join(block) for block in blocks)


def format_results(
    results: Mapping[str, Scores],
    comparison: Mapping[str, Any],
    costs: Mapping[str, Mapping[str, Any] | None],
    notes: Sequence[str],
    style: str,
) -> str:
    """All tables in one of the styles text, markdown, latex and csv."""
    if style == "csv":
        return format_csv(results, costs)
    if style == "latex":
        return format_latex(results, comparison, costs, notes)
    markdown = style == "markdown"
    parts = [format_table(results, markdown, costs), "\n".join(notes), format_comparison(comparison, markdown)]
    return ("\n\n" if markdown else "\n").join([parts[0], parts[1]]) + (f"\n\n{parts[2]}" if parts[2] else "")


def format_csv(results: Mapping[str, Scores], costs: Mapping[str, Mapping[str, Any] | None]) -> str:
    """One value a line: run, task, metric, value, lower and upper end of its interval, value of the constant baseline,
    frames, and whether it is recorded or unknown which frames the run was trained on."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["run", "task", "metric", "value", "low", "high", "constant", "frames", "trained_frames"])
    for run, scores in results.items():
        trained = "unknown" if is_unknown(scores) else "recorded"
        for task, score in scores.items():
            constants = score.get("baseline_metrics", {})
            for name, value in score["metrics"].items():
                interval = score.get("interval") if name == score["headline"] else None
                ends = interval or ("", "")
                writer.writerow([run, task, name, value, *ends, constants.get(name), score["frames"], trained])
            writer.writerow([run, task, "skill", score["skill"], "", "", "", score["frames"], trained])
        mean = average_skills(score["skill"] for score in scores.values())
        for name, value in {"mean_skill": mean, **(costs.get(run) or {})}.items():
            writer.writerow([run, "all", name, value, "", "", "", "", trained])
    return buffer.getvalue().rstrip("\n")


def format_latex(
    results: Mapping[str, Scores],
    comparison: Mapping[str, Any],
    costs: Mapping[str, Mapping[str, Any] | None],
    notes: Sequence[str],
) -> str:
    """A table for the package booktabs: a row for each run, a column for each primary metric, the best in bold; runs
    that differ by their seed alone are one row, mean and standard deviation. Mean skills are those of the comparison,
    against one constant baseline for all. Notes are comments."""
    tasks: dict[str, Mapping[str, Any]] = {}
    for scores in results.values():
        for task, score in scores.items():
            tasks.setdefault(task, score)
    seeds = comparison.get("seeds", {})
    groups = comparison.get("groups") or {run: [run] for run in results}
    baseline = comparison.get("baseline")
    columns = [*((task, score["better"]) for task, score in tasks.items()), ("all", "higher")]
    if baseline:
        columns.append(("delta", "higher"))
    most = max(len(list_skilled(scores)) for scores in results.values())
    values: dict[str, dict[str, tuple[float | None, float | None]]] = {}
    for name, runs in groups.items():
        own = {task: (score["score"], None) for task, score in results[runs[0]].items()}
        # a mean over other tasks is no rival
        if len(list_skilled(results[runs[0]])) == most:
            skill = average_skills(score["skill"] for score in results[runs[0]].values())
            own["all"] = (comparison.get("skills", {}).get(name, skill), None)
        own |= {task: (one["mean"], one["spread"]) for task, one in seeds.get(name, {}).items()}
        if baseline:
            own["delta"] = (baseline["rows"].get(name, {}).get("delta_m"), None)
        values[name] = own
    best = {}
    for key, better in columns:
        known = [own[key][0] for own in values.values() if own.get(key, (None,))[0] is not None]
        best[key] = (max if better == "higher" else min)(known) if known else None
    with_cost = any(costs.values())
    titles = [
        rf"{_escape(score['headline'])} {'(' + _escape(score['unit']) + ') ' if score['unit'] else ''}"
        rf"$\{'uparrow' if score['better'] == 'higher' else 'downarrow'}$"
        for score in tasks.values()
    ]
    titles += [r"mean skill $\uparrow$", *[r"$\Delta_m$ (\%) $\uparrow$"] * bool(baseline), *[*COST] * with_cost]
    lines = [
        "% needs \\usepackage{booktabs}",
        *(f"% {note}" for note in [*collect_rows(results, costs)[2], *notes]),
        rf"\begin{{tabular}}{{l{'r' * len(titles)}}}",
        r"\toprule",
        " & ".join(["run", *titles]) + r" \\",
        r"\midrule",
    ]
    for name, runs in groups.items():
        cells = [_show_cell(values[name].get(key, (None, None)), best[key]) for key, _ in columns]
        cost = _show_cost(costs.get(runs[0])) if with_cost else []
        shown = _escape(name) + "*" * any(is_unknown(results[run]) for run in runs)
        shown += f" ({len(runs)} seeds)" * (len(runs) > 1)
        lines.append(
            " & ".join([shown, *cells, *(cell.replace("-", "--") if cell == "-" else cell for cell in cost)]) + r" \\"
        )
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"])


def _show_cell(value: tuple[float | None, float | None], best: float | None) -> str:
    mean, spread = value
    if mean is None:
        return "--"
    text = show(mean)
    text = rf"\textbf{{{text}}}" if best is not None and text == show(best) else text
    return text if spread is None else rf"{text} $\pm$ {spread:.2g}"


_SPECIAL = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
}  # fmt: skip


def _escape(text: str) -> str:
    return "".join(_SPECIAL.get(character, character) for character in text)
