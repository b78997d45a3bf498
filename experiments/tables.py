"""The tables of a study, as Markdown."""

import statistics
from collections.abc import Sequence

from experiments.analysis import Against, ArmResults, Study, measure_recovery
from experiments.grid import SHARED, Comparison
from scoring.compare import DELTA_M
from scoring.table import layout
from tasks import TASKS


def format_study(study: Study, level: int = 1) -> str:
    """Every arm's scores, then every comparison, of what has results or failed; of a part of a grid the rest is only
    named. `level`: of the heading that is the title."""
    grid, mark, empty = study.grid, "#" * level, []
    lines = [f"{mark} {grid.study.title}", ""] if grid.study.title else []
    lines += [f"Scores on the {study.subset} subset. {DELTA_M}.", ""]
    lines += [f"{mark}# Scores", "", *layout(*list_scores(study), markdown=True), ""]
    for comparison in grid.study.comparisons:
        found = study.compare(comparison)
        arms = [study.arms[name] for name in (*comparison.references, *comparison.arms)]
        failed = [f"{own.arm.title} ({len(own.failed)})" for own in arms if own.failed]
        if not found and not failed:
            empty.append(comparison.title)
            continue
        lines += [f"{mark}# {comparison.title}", ""] + ([comparison.about, ""] if comparison.about else [])
        lines += [f"Failed runs: {', '.join(failed)}.", ""] if failed else []
        if not found:
            lines += ["Nothing is left to compare.", ""]
            continue
        lines += [describe_reference(study, comparison), ""]
        goal = None if comparison.goal is None else study.arms[comparison.goal]
        start = study.find_reference(comparison)
        lines += [*layout(*list_comparison(study, found, start, goal), markdown=True), ""]
    lines += [f"Nothing to compare yet: {'; '.join(empty)}.", ""] if empty else []
    if study.tuning:
        lines += [f"{mark}# Tuning", "", *list_tuning(study), ""]
    lines += list_notes(study)
    return "\n".join(lines) + "\n"


def describe_reference(study: Study, comparison: Comparison) -> str:
    """What the arms of a table stand against."""
    reference = study.arms[comparison.reference]
    text = f"Against {reference.arm.title} (`{comparison.reference}`)"
    if comparison.rest is None:
        return f"{text}."
    rest = study.arms[comparison.rest]
    tasks = " and ".join(name for name in study.grid.tasks if name in set(rest.expected) - set(reference.expected))
    return f"{text}, in {tasks} against {rest.arm.title} (`{comparison.rest}`)."


def list_scores(study: Study) -> tuple[list[str], list[list[str]]]:
    tasks = study.grid.tasks
    header = ["arm", "seeds", "labels", *(f"{name} {TASKS[name].primary_metric}" for name in tasks), "images", "TFLOP"]
    rows = []
    for own in study.arms.values():
        if not own.scores and not own.failed:
            continue
        numbers = " / ".join(str(own.labels[name]) if name in own.labels else "-" for name in tasks)
        cells = [show_scores(own.list_scores(name), len(own.seeds)) if name in own.expected else "" for name in tasks]
        rows.append(
            [
                own.arm.title,
                show_seeds(own),
                numbers,
                *cells,
                f"{own.work.images}",
                f"{own.work.total_flops / 1e12:.1f}",
            ]
        )
    return header, rows


def list_tuning(study: Study) -> list[str]:
    """What was tried for each network, and what was taken."""
    tuning = study.grid.study.tuning
    assert tuning is not None
    names = list(dict.fromkeys(name for setting in tuning.settings for name in setting))
    networks = list(dict.fromkeys((each.arm, each.network) for each in study.tuning))
    trials = list(dict.fromkeys((each.is_whole, *map(each.options.get, names)) for each in study.tuning))
    rows = []
    for whole, *values in sorted(trials, key=lambda trial: trial[0]):
        row = ["all" if whole else f"{tuning.share:.0%}", *map(str, values)]
        for arm, network in networks:
            found = [
                each for each in study.tuning
                if (each.arm, each.network, each.is_whole) == (arm, network, whole)
                and [each.options.get(name) for name in names] == values
            ]  # fmt: skip
            skill = "failed" if found and found[0].skill is None else f"{found[0].skill:.4f}" if found else ""
            row.append(f"**{skill}**" if found and found[0].taken else skill)
        rows.append(row)
    columns = [study.arms[arm].arm.title if network == SHARED else network for arm, network in networks]
    header = ["steps", *(name.rpartition(".")[2] for name in names), *columns]
    about = (
        "Skill on the validation subset, first seed; what was taken is bold. All other arms inherit it; a whole run "
        "that was taken is also that of the first seed."
    )
    own = [f'"{arm.title}"' for arm in study.grid.study.arms.values() if arm.tuned is None]
    about += f" Not tuned, with options of their own: {', '.join(own)}." if own else ""
    return [about, "", *layout(header, rows, markdown=True)]


def show_seeds(own: ArmResults) -> str:
    """How many seeds have a result of all networks, and what failed."""
    failed = f", {len(own.failed)} runs failed" if own.failed else ""
    missing = f" of {len(own.arm.seeds)}" if own.missing else ""
    return f"{len(own.seeds)}{missing}{failed}"


def show_scores(scores: Sequence[float], expected: int) -> str:
    """The mean, and the standard deviation between seeds (n - 1); in brackets their number, if it is not that of seeds
    with all networks."""
    if not scores:
        return "-"
    spread = f" ± {statistics.stdev(scores):.2g}" if len(scores) > 1 else ""
    return f"{statistics.fmean(scores):.4g}{spread}" + f" ({len(scores)})" * (len(scores) != expected)


def list_comparison(
    study: Study, found: Sequence[Against], start: ArmResults, goal: ArmResults | None
) -> tuple[list[str], list[list[str]]]:
    tasks = [name for name in study.grid.tasks if any(name in each.terms for each in found)]
    left_out = [name for name in study.grid.study.without if len(tasks) > 1 and name in tasks]
    header = ["arm", "seeds", *(f"{name} %" for name in tasks), "Delta-m %", "95 % interval"]
    header += [*(f"without {name} %" for name in left_out), "skill", "95 % interval", "P(A > B)"]
    header += ["of the way"] * (goal is not None)
    rows = []
    for each in found:
        row = [study.arms[each.arm].arm.title, f"{len(each.seeds)}"]
        row += [show_signed(each.terms[name]) if name in each.terms else "" for name in tasks]
        spread = "" if each.deviation is None else f" ± {each.deviation:.1f}"
        row += [show_signed(each.delta_m) + spread, show_range(each.interval)]
        row += [show_signed(each.without.get(name)) for name in left_out]
        row += [show_signed(each.skill, 3), show_range(each.skill_interval, 3)]
        row += ["-" if each.probability is None else f"{each.probability:.2f}"]
        if goal is not None:
            share = measure_recovery(study.arms[each.arm], start, goal)
            some = share is not None and share[1] != len(each.seeds)
            row.append("-" if share is None else f"{share[0]:.0%}" + f" ({share[1]})" * some)
        rows.append(row)
    return header, rows


def show_signed(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:+.{digits}f}"


def show_range(interval: tuple[float, float] | None, digits: int = 1) -> str:
    return "-" if interval is None else f"{interval[0]:+.{digits}f} .. {interval[1]:+.{digits}f}"


def list_notes(study: Study) -> list[str]:
    """Which runs failed or are missing, and where the others were made."""
    failed = [name for own in study.arms.values() for name in own.failed]
    missing = [name for own in study.arms.values() for name in own.missing]
    lines = [
        "± is the standard deviation between seeds. Intervals: 95 %, from resampling scenes, in them blocks of 5 s or "
        "more, and the seeds, in pairs; one seed alone is not resampled, so its interval is that of the frames, and "
        "with two to five seeds it is too narrow. They are not corrected for the number of comparisons. Terms of "
        "Delta-m are those of each seed, averaged.",
        "",
        "A number in brackets is that of seeds, where a cell has others than its row; rows with unlike numbers of "
        "seeds have unlike runs of the reference behind them. Images: that pass the networks of one seed in their own "
        "training. TFLOP: of that training, of the teachers' and of those that calibrate them, and of writing "
        "pseudo-labels.",
        "",
    ]
    if failed:
        lines += [f"Failed: {', '.join(failed)}.", ""]
    if missing:
        lines += [f"Not trained yet: {len(missing)} runs, such as {missing[0]}.", ""]
    if study.strangers:
        lines += [
            f"{len(study.strangers)} students, such as {study.strangers[0]}, have learned from other weights of their "
            "teachers than those that are scored here: the teachers were trained again since, with the same config.",
            "",
        ]
    made = [
        f"{each['device']}, {each['cores']} cores, Python {each['python']}, PyTorch {each['packages']['torch']}, "
        f"commits {', '.join(each['commits'])}"
        for each in study.machines
    ]
    command = f"`python experiments/run.py {study.grid.path}`"
    changed = any(commit.endswith("*") for each in study.machines for commit in each["commits"])
    star = " *: with files that were not committed, which new results are, too." if changed else ""
    return [*lines, f"Made by {command} on: {'; '.join(made)}.{star}"] if made else lines
