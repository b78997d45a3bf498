"""What the results of a grid say: scores of arms, and arms against each other, seed by seed."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from jaxtyping import Float64

from experiments.cost import CostCounter, Work
from experiments.grid import Arm, Comparison, Grid, Run
from scoring.bootstrap import find_interval
from scoring.compare import (
    TaskResult,
    average_all,
    average_draws,
    average_skills,
    find_delta,
    find_delta_draws,
    find_probability,
    mean_skill_draws,
    share_constants,
)
from tasks import TASKS

SEED = 0  # of the draws of seeds
# in a result, the scores on the subset that tables are about: "subset", "frames", a digest of their names and order,
# "resampled", the number of draws, and "scores"
KEPT = "final"


@dataclass
class ArmResults:
    """`scores`: seed -> task -> result on the subset that is scored; `failed`: names of runs that failed; `missing`: of
    runs without a result; `work`: of one seed, all networks together, with the teachers; `labels`: task -> the number
    of labels it was trained on, of the first seed that has it."""

    name: str
    arm: Arm
    scores: dict[int, dict[str, TaskResult]] = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    work: Work = field(default_factory=Work)
    labels: dict[str, int] = field(default_factory=dict)
    expected: tuple[str, ...] = ()

    @property
    def seeds(self) -> list[int]:
        """Those of which all networks have a result."""
        return [seed for seed, tasks in sorted(self.scores.items()) if set(tasks) == set(self.expected)]

    def list_scores(self, task: str) -> list[float]:
        """One for each seed that has it."""
        return [tasks[task].score for _, tasks in sorted(self.scores.items()) if task in tasks]


@dataclass(frozen=True)
class Against:
    """An arm against a reference, on the `seeds` that both have: `terms`, of Delta-m in percent, by task, and their
    intervals; `delta_m`, its standard deviation between seeds (n - 1; None for one), and `without` each task; `skill`,
    the mean difference of mean skills; `probability`: the share of pairs of a run of each in which that of the arm has
    the better mean skill."""

    arm: str
    reference: str
    seeds: list[int]
    terms: dict[str, float]
    term_intervals: dict[str, tuple[float, float] | None]
    delta_m: float | None
    deviation: float | None
    interval: tuple[float, float] | None
    without: dict[str, float | None]
    skill: float | None
    skill_interval: tuple[float, float] | None
    probability: float | None


@dataclass(frozen=True)
class Tried:
    """One run of tuning: validated on the first seed. `skill`: None for a run that failed; `taken`: by the runs of the
    study."""

    network: str
    arm: str
    is_whole: bool
    options: dict[str, Any]
    skill: float | None
    taken: bool


@dataclass
class Study:
    """`subset`: that is scored, "test" or, where it has not been opened, "val". `machines`: where runs were made, with
    the `commits` they were made at; `strangers`: students whose result is that of other weights of their teachers than
    the teachers' results are of, because these have been trained again since."""

    grid: Grid
    arms: dict[str, ArmResults]
    subset: str
    machines: list[dict[str, Any]]
    tuning: list[Tried] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)

    def find_reference(self, comparison: Comparison) -> ArmResults:
        """With the scores of another arm for the tasks that it does not train, if the comparison names one."""
        reference = self.arms[comparison.reference]
        return reference if comparison.rest is None else complete_arm(reference, self.arms[comparison.rest])

    def compare(self, comparison: Comparison) -> list[Against]:
        """Every arm of a comparison that has a seed in common with the reference."""
        reference = self.find_reference(comparison)
        found = [compare_arms(self.arms[name], reference) for name in comparison.arms]
        return [each for each in found if each is not None]


def gather_study(grid: Grid, counter: CostCounter) -> Study:
    """All that there is, on the grid's subset where every finished run has been scored on it, else as validated.
    ValueError for results that were scored on unlike frames."""
    everyone = grid.list_runs()
    results: dict[str, dict[str, Any] | None] = {}
    for run in everyone:
        try:
            results[run.name] = grid.read_result(run)
        except KeyError:
            results[run.name] = None
    runs = [run for run in everyone if not run.is_tuning]
    there = {run.name: result for run in runs if (result := results[run.name]) is not None and not result["failed"]}
    opened = bool(there) and all(is_scored(result, grid.study.subset) for result in there.values())
    subset = grid.study.subset if opened else "val"
    check_frames(there, opened)
    arms: dict[str, ArmResults] = {}
    for run in runs:
        arm = grid.study.arms[run.arm]
        own = arms.setdefault(run.arm, ArmResults(run.arm, arm, expected=arm.tasks or grid.tasks))
        _add_result(own, run, results[run.name], opened)
        if run.seed == arm.seeds[0]:
            result = results[run.name]
            own.work += counter.count(run, tuned=False) if result is None else Work.from_result(result["cost"])
    machines: dict[str, dict[str, Any]] = {}
    for made in (result["made"] for result in results.values() if result is not None):
        key = f"{made['packages']} {made['device']} {made['cores']} {made['python']}"
        commits = machines.setdefault(key, made | {"commits": []})["commits"]
        commit = (made["git"]["commit"] or "unknown")[:10] + "*" * bool(made["git"]["changed"])
        if commit not in commits:
            commits.append(commit)
    return Study(grid, arms, subset, list(machines.values()), list_tried(grid), list_strangers(results))


def is_scored(result: Mapping[str, Any], subset: str) -> bool:
    """Whether scores on the subset are kept with a result; those on another one do not count."""
    return KEPT in result and result[KEPT]["subset"] == subset


def check_frames(results: Mapping[str, Mapping[str, Any]], opened: bool) -> None:
    """ValueError if two results are not of the same frames: a difference between them would say nothing."""
    seen: dict[Any, tuple[Any, str]] = {}
    for name, result in results.items():
        about = {"frames": (result[KEPT]["frames"], result[KEPT]["resampled"])} if opened else {
            task: score["frames"] for task, score in result["val"].items()
        }  # fmt: skip
        for key, value in about.items():
            other, first = seen.setdefault(key, (value, name))
            if value != other:
                raise ValueError(
                    f"{first} and {name} were scored on unlike frames ({key}: {other}, {value}); delete the result of "
                    "one of them, and train it again on the dataset of the other"
                )


def list_strangers(results: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
    """See Study."""
    found = []
    for name, result in results.items():
        teachers = {} if result is None else result["teachers"]
        kept = {teacher: results.get(teacher) for teacher in teachers}
        if any(each is not None and each["weights"] != teachers[teacher] for teacher, each in kept.items()):
            found.append(name)
    return found


def list_tried(grid: Grid) -> list[Tried]:
    """All finished runs of tuning."""
    tried = []
    for run in grid.list_runs():
        try:
            result = grid.read_result(run) if run.is_tuning else None
            own = None if result is None else grid.find_best_setting(run)
        except KeyError:
            continue
        if result is None or own is None or grid.study.tuning is None:
            continue
        try:
            best = grid.find_best_setting(replace(run, setting=None, finalist=None))
        except KeyError:
            best = None
        options = grid.study.tuning.settings[own]
        taken = best == own and (run.finalist is not None or grid.study.tuning.finals is None)
        tried.append(Tried(run.network, run.arm, run.finalist is not None, options, result["skill"], taken))
    return tried


def _add_result(own: ArmResults, run: Run, result: dict[str, Any] | None, opened: bool) -> None:
    if result is None:
        own.missing.append(run.name)
        return
    if result["failed"]:
        own.failed.append(run.name)
        return
    for task, score in (result[KEPT]["scores"] if opened else result["val"]).items():
        draws, constant_draws = read_draws(score.get("draws")), read_draws(score.get("constant_draws"))
        if draws is not None and constant_draws is None and score["constant"] is not None:
            constant_draws = np.full_like(draws, score["constant"])  # it is 0 in every draw, and not kept
        own.scores.setdefault(run.seed, {})[task] = TaskResult(
            TASKS[task](), score["score"], score["constant"], draws, constant_draws
        )
    own.labels = {task: number for task, number in result["labels"].items() if task in run.tasks} | own.labels


def read_draws(text: str | None) -> Float64[np.ndarray, " R"] | None:
    return None if text is None else np.array([float(value) for value in text.split()])


def complete_arm(own: ArmResults, other: ArmResults) -> ArmResults:
    """An arm with the scores of another one for the tasks that it does not train; its seeds are those that both have.
    Where the labels of some tasks are rationed, the networks of the others are those of full labels."""
    scores = {seed: other.scores.get(seed, {}) | tasks for seed, tasks in own.scores.items()}
    return replace(own, scores=scores, expected=tuple(dict.fromkeys((*own.expected, *other.expected))))


def compare_arms(own: ArmResults, reference: ArmResults) -> Against | None:
    """None if no seed has results of both."""
    seeds = [seed for seed in own.seeds if seed in reference.seeds]
    if not seeds or own is reference:
        return None
    tasks = [task for task in own.expected if task in reference.expected]
    chosen = draw_seeds(len(seeds), _count_draws(own, seeds, tasks))
    terms, term_draws = {}, {}
    deltas: list[list[float | None]] = [[] for _ in seeds]
    for task in tasks:
        pairs = [(own.scores[seed][task], reference.scores[seed][task]) for seed in seeds]
        each = [find_delta(one, other) for one, other in pairs]
        terms[task] = statistics.fmean(each) if None not in each else None
        for number, term in enumerate(each):
            deltas[number].append(term)
        term_draws[task] = _average_seeds([find_delta_draws(one, other) for one, other in pairs], chosen)
    # with one constant for all, so that skills can be compared, also those of two seeds
    parts = {(name, seed): arm.scores[seed] for name, arm in (("reference", reference), ("own", own)) for seed in seeds}
    everyone = share_constants(parts)
    shared = [{name: everyone[name, seed] for name in ("own", "reference")} for seed in seeds]
    means = {name: [average_skills(pair[name][task].skill for task in tasks) for pair in shared] for name in shared[0]}
    drawn = {name: [mean_skill_draws(pair[name], tasks) for pair in shared] for name in shared[0]}
    differences = [
        None if one is None or other is None else one - other
        for one, other in zip(drawn["own"], drawn["reference"], strict=True)
    ]
    return Against(
        own.name, reference.name, seeds, terms,
        {task: _interval(draws) for task, draws in term_draws.items()},
        average_all(list(terms.values())), find_deviation([average_all(each) for each in deltas]),
        _interval(average_draws(list(term_draws.values()))),
        {left_out: average_all([term for task, term in terms.items() if task != left_out]) for left_out in tasks}
        if len(tasks) > 1 else {},
        statistics.fmean(a - b for a, b in zip(means["own"], means["reference"], strict=True)),
        _interval(_average_seeds(differences, chosen)),
        find_probability(means["own"], means["reference"]),
    )  # fmt: skip


def find_deviation(values: Sequence[float | None]) -> float | None:
    """The standard deviation (n - 1); None for fewer than two, or where one is missing."""
    there = [value for value in values if value is not None]
    return statistics.stdev(there) if len(there) == len(values) > 1 else None


def find_score_interval(own: ArmResults, task: str) -> tuple[float, float] | None:
    """Of the mean score of an arm over its seeds, which are drawn too; None where there are no draws."""
    parts = [tasks[task].draws for _, tasks in sorted(own.scores.items()) if task in tasks]
    if not parts or parts[0] is None:
        return None
    return _interval(_average_seeds(parts, draw_seeds(len(parts), len(parts[0]))))


def measure_recovery(own: ArmResults, start: ArmResults, goal: ArmResults) -> tuple[float, int] | None:
    """How much of the way from one arm to another a third has come, by Delta-m over the start, on the seeds that all
    three have, and how many these are; None where there is no way, or for an arm of other tasks."""
    if set(own.expected) != set(goal.expected) or not set(own.expected) <= set(start.expected):
        return None
    seeds = set(own.seeds) & set(start.seeds) & set(goal.seeds)
    if not seeds:
        return None
    parts = []
    for arm in (own, goal):
        terms = [
            find_delta(arm.scores[seed][task], start.scores[seed][task]) for seed in seeds for task in arm.expected
        ]
        parts.append(average_all(terms))
    return (parts[0] / parts[1], len(seeds)) if None not in parts and parts[1] and parts[1] > 0 else None


def draw_seeds(count: int, draws: int) -> np.ndarray:
    """Which seeds count in each draw: as many as there are, with replacement."""
    return np.random.default_rng(SEED).integers(0, count, (draws, count))


def _count_draws(own: ArmResults, seeds: Sequence[int], tasks: Sequence[str]) -> int:
    draws = own.scores[seeds[0]][tasks[0]].draws
    return 0 if draws is None else len(draws)


def _average_seeds(parts: Sequence[np.ndarray | None], chosen: np.ndarray) -> np.ndarray | None:
    """In each draw the mean over the seeds that count in it."""
    if not parts or any(part is None for part in parts):
        return None
    stacked = np.stack([part for part in parts if part is not None])
    return stacked[chosen, np.arange(stacked.shape[1])[:, None]].mean(axis=1)


def _interval(values: np.ndarray | None) -> tuple[float, float] | None:
    return None if values is None or not len(values) else find_interval(values)
