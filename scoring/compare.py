"""Runs against each other: Delta-m, differences of skills, groups of seeds, and what chance alone would do.

A group is one run, or several whose configs differ by the seed alone. Scores of a group are means over its runs.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, product
from typing import Any

import numpy as np

from scoring.bootstrap import find_interval

DELTA_M = (
    "Delta-m = 100 / T x the sum over T tasks of s x (score - baseline) / baseline, where s is 1 if higher is better "
    "and else -1 (Maninis et al. 2019, arXiv 1904.08918)"
)
LEAST_SKILL = -1.0  # in a mean


@dataclass
class TaskResult:
    """A run's primary metric of a task. `task` says which is better, and what a skill is. `score` and `constant`, that
    of the constant baseline, are None where they are not defined; `draws` and `constant_draws` are those of the
    bootstrap, None without one."""

    task: Any
    score: float | None
    constant: float | None
    draws: np.ndarray | None = None
    constant_draws: np.ndarray | None = None

    @property
    def sign(self) -> int:
        """1 if a higher score is better, else -1."""
        return 1 if self.task.better == "higher" else -1

    @property
    def skill(self) -> float | None:
        return None if None in (self.score, self.constant) else self.task.skill(self.score, self.constant)

    @property
    def skill_draws(self) -> np.ndarray | None:
        if self.draws is None or self.skill is None:
            return None
        pairs = zip(self.draws.tolist(), self.constant_draws.tolist(), strict=True)
        skills = [self.task.skill(score, constant) for score, constant in pairs]
        return np.array([math.nan if skill is None else skill for skill in skills])


def average_skills(skills: Iterable[float | None]) -> float | None:
    """The mean of the skills that are known; None if there is none.

    A skill below -1, an error of more than twice the constant baseline's, counts as -1: a task has at most the share of
    one task in the choice of the best weights.
    """
    known = [max(skill, LEAST_SKILL) for skill in skills if skill is not None]
    return sum(known) / len(known) if known else None


Results = Mapping[str, Mapping[str, TaskResult]]
"""run -> task -> result"""


def share_constants(results: Results, first: Sequence[str] = ()) -> Results:
    """The results with one constant baseline for each task, that of the first run that has one, beginning with `first`:
    skills against different constants cannot be compared."""
    shared: dict[str, TaskResult] = {}
    for run in [*first, *results]:
        for task, result in results[run].items():
            if result.constant is not None:
                shared.setdefault(task, result)
    return {
        run: {
            task: dataclasses.replace(
                result, constant=shared[task].constant, constant_draws=shared[task].constant_draws
            )
            if task in shared
            else result
            for task, result in tasks.items()
        }
        for run, tasks in results.items()
    }


def average_groups(results: Results, groups: Mapping[str, list[str]]) -> dict[str, float | None]:
    """Of each group the mean skill: the mean over its runs of that over tasks."""
    return {
        name: _average([average_skills(each.skill for each in results[run].values()) for run in runs])
        for name, runs in groups.items()
    }


def find_groups(recipes: Mapping[str, tuple[str, int] | None]) -> dict[str, list[str]]:
    """The runs of each group, named by the first. recipes: of each run a fingerprint of its config without the seed,
    and the seed; a run without one is alone, and so is one whose seed is in the group already, such as the predictions
    of one of its runs."""
    groups: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    seeds: set[tuple[str, int]] = set()
    for run, recipe in recipes.items():
        name = run if recipe is None or recipe in seeds else first.setdefault(recipe[0], run)
        groups.setdefault(name, []).append(run)
        if recipe is not None:
            seeds.add(recipe)
    return groups


def find_delta(result: TaskResult, baseline: TaskResult) -> float | None:
    """The term of one task in Delta-m, in percent; None where the baseline is 0."""
    if result.score is None or not baseline.score:
        return None
    return result.sign * 100 * (result.score - baseline.score) / baseline.score


def _average(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


def average_draws(parts: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """The mean in each draw; None if one has no draws."""
    if not parts or any(part is None for part in parts):
        return None
    return np.mean(parts, axis=0)


@dataclass
class Member:
    """A group's scores: of each task the mean over its runs, and that of each draw."""

    name: str
    runs: list[str]
    tasks: dict[str, TaskResult] = field(default_factory=dict)

    @classmethod
    def gather(cls, name: str, runs: list[str], results: Results) -> "Member":
        tasks: dict[str, TaskResult] = {}
        for task in dict.fromkeys(task for run in runs for task in results[run]):
            own = [results[run][task] for run in runs if task in results[run]]
            if any(each.score is None for each in own):
                continue
            tasks[task] = TaskResult(
                own[0].task,
                _average([each.score for each in own]),
                _average([each.constant for each in own]),
                average_draws([each.draws for each in own]),
                average_draws([each.constant_draws for each in own]),
            )
        return cls(name, runs, tasks)


def mean_skill_draws(results: Mapping[str, TaskResult], tasks: Sequence[str]) -> np.ndarray | None:
    skills = [results[task].skill_draws for task in tasks if task in results and results[task].skill is not None]
    if not skills or any(each is None for each in skills):
        return None
    return np.mean([np.maximum(each, LEAST_SKILL) for each in skills], axis=0)


def compare_with_baseline(
    results: Results, groups: Mapping[str, list[str]], baselines: Sequence[str]
) -> dict[str, Any]:
    """Each group against the baselines, which have one or more tasks each: Delta-m with and without each task, and the
    mean difference of skills. The score of a task is the mean over the baselines that have it."""
    reference = Member.gather("baseline", list(baselines), results)
    rows = {}
    for name, runs in groups.items():
        if set(runs) <= set(baselines):
            continue
        member = Member.gather(name, runs, results)
        tasks = [task for task in member.tasks if task in reference.tasks]
        terms = {task: find_delta(member.tasks[task], reference.tasks[task]) for task in tasks}
        skills = [task for task in tasks if None not in (member.tasks[task].skill, reference.tasks[task].skill)]
        own, other = (average_skills(each.tasks[task].skill for task in skills) for each in (member, reference))
        rows[name] = {
            "tasks": tasks,
            "terms": terms,
            "delta_m": average_all(list(terms.values())),
            "interval": _find_delta_interval(member, reference, tasks),
            "without": {
                left_out: average_all([term for task, term in terms.items() if task != left_out])
                for left_out in tasks
                if len(tasks) > 1
            },
            "skill_difference": None if own is None or other is None else own - other,
            "skill_interval": _find_difference(
                mean_skill_draws(member.tasks, skills), mean_skill_draws(reference.tasks, skills)
            ),
        }
    return {"baselines": list(baselines), "rows": rows}


def average_all(terms: Sequence[float | None]) -> float | None:
    """The mean; None if one is not known."""
    return statistics.fmean(terms) if terms and None not in terms else None


def find_delta_draws(result: TaskResult, baseline: TaskResult) -> np.ndarray | None:
    """The term of one task in Delta-m in each draw; NaN where that of the baseline is 0, None without draws."""
    own, other = result.draws, baseline.draws
    if own is None or other is None or len(own) != len(other):
        return None
    return result.sign * 100 * np.divide(own - other, other, out=np.full_like(own, np.nan), where=other > 0)


def _find_delta_interval(member: Member, reference: Member, tasks: list[str]) -> tuple[float, float] | None:
    draws = average_draws([find_delta_draws(member.tasks[task], reference.tasks[task]) for task in tasks])
    return None if draws is None else find_interval(draws)


def _find_difference(own: np.ndarray | None, other: np.ndarray | None) -> tuple[float, float] | None:
    return None if own is None or other is None else find_interval(own - other)


def summarise_seeds(results: Results, groups: Mapping[str, list[str]]) -> dict[str, dict[str, Any]]:
    """Of each group of two or more runs and each task: the mean, the standard deviation between seeds (n - 1), and the
    scores; and the same of the mean skill under "all"."""
    summary: dict[str, dict[str, Any]] = {}
    for name, runs in groups.items():
        if len(runs) < 2:
            continue
        tasks = dict.fromkeys(task for run in runs for task in results[run])
        columns = {task: [results[run][task].score for run in runs if task in results[run]] for task in tasks}
        columns["all"] = [average_skills(each.skill for each in results[run].values()) for run in runs]
        summary[name] = {
            task: {
                "runs": runs,
                "mean": statistics.fmean(values),
                "spread": statistics.stdev(values) if len(values) > 1 else None,
                "scores": values,
            }
            for task, values in columns.items()
            if values and None not in values
        }
    return summary


def compare_pairs(results: Results, groups: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    """Each pair of groups, in each task that both have and in mean skill: the difference of scores A - B with its
    interval over the same draws, and, where a group has several seeds, P(A > B): the share of pairs of a run of A and
    one of B in which that of A is better, where equal scores count half."""
    members = [Member.gather(name, runs, results) for name, runs in groups.items()]
    rows = []
    for one, other in combinations(members, 2):
        common = [task for task in one.tasks if task in other.tasks]
        for task in common:
            a, b = one.tasks[task], other.tasks[task]
            rows.append(
                {
                    "a": one.name,
                    "b": other.name,
                    "task": task,
                    "difference": a.score - b.score,
                    "interval": _find_difference(a.draws, b.draws),
                    "probability": find_probability(
                        [a.sign * results[run][task].score for run in one.runs if task in results[run]],
                        [a.sign * results[run][task].score for run in other.runs if task in results[run]],
                    ),
                }
            )
        skilled = [task for task in common if None not in (one.tasks[task].skill, other.tasks[task].skill)]
        if len(skilled) > 1:
            skills = [
                [average_skills(results[run][task].skill for task in skilled) for run in member.runs]
                for member in (one, other)
            ]
            rows.append(
                {
                    "a": one.name,
                    "b": other.name,
                    "task": "all",
                    "difference": average_skills(one.tasks[task].skill for task in skilled)
                    - average_skills(other.tasks[task].skill for task in skilled),
                    "interval": _find_difference(
                        mean_skill_draws(one.tasks, skilled), mean_skill_draws(other.tasks, skilled)
                    ),
                    "probability": find_probability(*skills),
                }
            )
    return rows


def find_probability(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The share of pairs in which that of the first is greater, where equal ones count half; None for single scores."""
    if len(first) < 2 and len(second) < 2:
        return None
    wins = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in product(first, second)]
    return statistics.fmean(wins)
