"""Open the test subset for the finished runs of a grid, and write its tables and plots.

    python experiments/tabulate.py configs/study/main.yaml --output RESULTS.md --plots docs/study

A run is scored on the test subset once, and the scores are kept with its result, so tables can be made again where its
weights are not. Intervals come from resampling scenes, and blocks of some seconds in them, and, where an arm has
several seeds, its seeds: the draws are the same for all runs, and the seeds are drawn in pairs.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if not __package__:
    # as a script, from any folder and uninstalled; in place of this folder, whose files have other packages' names
    sys.path[0] = str(ROOT)

from a2d2.console import allow_any_text
from experiments.run import parse_weights
from training.arguments import count, count_or_none
from training.stopping import exit_on_interrupt

DONE, ERROR, WRONG_USE = 0, 1, 2


def read_arguments() -> argparse.Namespace:
    allow_any_text()
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("grid", type=Path, help="YAML file; see configs/study/")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the runs")
    parser.add_argument("--results", type=Path, help="folder of the results (default: experiments/results/GRID)")
    parser.add_argument(
        "--output", type=Path,
        help="write the tables to this Markdown file (default: print them); in one with the lines <!-- GRID --> and "
        "<!-- end of GRID --> only between these",
    )  # fmt: skip
    parser.add_argument("--plots", type=Path, help="folder for the plots")
    parser.add_argument(
        "--weights", nargs="+", default=[], metavar="ENCODER=FILE", type=parse_weights, help="see run.py"
    )
    parser.add_argument("--closed", action="store_true", help="do not open the test subset: tables on what is there")
    parser.add_argument("--draws", type=count, default=300, help="draws of the bootstrap (default: 300)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    parser.add_argument("--micro-batch", type=count, default=16, help="frames at a time")
    parser.add_argument("--workers", type=count_or_none, default=0, help="processes that load frames")
    return parser.parse_args()


if __name__ == "__main__":
    exit_on_interrupt("tabulate")
    ARGUMENTS = read_arguments()

import hashlib
from typing import Any

import numpy as np
from tqdm import tqdm

from evaluate import draw_frames, score_frames
from experiment import Data, Trained, load_recorded_data, load_trained, pick_device
from experiments.analysis import KEPT, Study, gather_study, is_scored
from experiments.cost import CostCounter
from experiments.grid import Grid, GridError, Run, has_weights, read_grid
from experiments.plots import draw_plots
from experiments.tables import format_study
from scoring.predictors import make_predictor
from tasks.options import OPTIONS
from training.config import compose_protocol
from training.files import whole_file
from training.loading import WorkerError

DIGITS = 4  # of a kept draw: 0.01 % of it


def open_test(grid: Grid, runs: list[Run], arguments: argparse.Namespace) -> list[str]:
    """Score every finished run that has not been on the subset that tables are about; returns the runs whose weights
    are not there, or are not those that its result is about."""
    device = pick_device(arguments.device, "--device")
    missing = []
    subset = grid.study.subset
    left = [
        run for run in runs
        if (result := find_result(grid, run)) and not result["failed"] and not is_scored(result, subset)
    ]  # fmt: skip
    for run in tqdm(left, desc=f"score on {subset}", unit="run"):
        folder = arguments.runs / run.name
        result = find_result(grid, run)
        assert result is not None
        if not has_weights(result, folder):
            missing.append(run.name)
            continue
        trained = load_trained(folder, device)
        scores = score_run(trained, subset, device, arguments)
        if find_result(grid, run) != result:
            raise ValueError(f"{run.name} was trained again while it was scored; the same command goes on")
        grid.write_result(run, result | {KEPT: scores})
    return missing


def find_result(grid: Grid, run: Run) -> dict[str, Any] | None:
    try:
        return grid.read_result(run)
    except KeyError:
        return None


def score_run(trained: Trained, subset: str, device: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Of each task its primary metric on the subset, that of the constant baseline, and both in each draw. ValueError
    if the dataset is not what it was when the run was trained."""
    assert trained.record is not None
    data: Data = load_recorded_data(trained.record, trained.split)
    frames, where = data.subsets[subset], ", ".join(map(str, data.roots))
    if not frames or len(frames) < len(trained.record.subsets[subset]):
        recorded = len(trained.record.subsets[subset])
        raise ValueError(f"{trained.name}: {where} has {len(frames)} of its {recorded} recorded {subset} frames")
    kinds = [task.kind for task in trained.tasks.values()]
    if sorted(data.find_identity(kinds)) != sorted(trained.record.identity):
        raise ValueError(f"{trained.name}: {where} was made with other options since the run was trained")
    draws = draw_frames(frames, arguments.draws)
    protocol = compose_protocol(OPTIONS).model_validate(trained.header["protocol"])
    parts = score_frames(
        make_predictor(trained, device), trained.tasks, frames, data, device, arguments.micro_batch, arguments.workers,
        lambda: None, protocol,
    )  # fmt: skip
    scores = {}
    for name, part in parts.items():
        row = part.summarise()
        own, constant = part.resample(draws.counts, draws.place)
        scores[name] = {
            "headline": row["headline"], "score": row["score"], "constant": row["constant"], "frames": row["frames"],
            "draws": write_draws(own),
            "constant_draws": write_draws(constant) if row["constant"] else None,  # where it is 0, so is every draw
        }  # fmt: skip
    names = "\n".join(map(str, frames))
    digest = hashlib.sha256(names.encode()).hexdigest()[:16]
    return {"subset": subset, "frames": digest, "resampled": arguments.draws, "scores": scores}


def fill_page(path: Path, study: Study) -> str:
    """The page with the tables in their place, under a heading of the second level; where there is no such page, or no
    such place, the tables alone. ValueError for a page with one of the two lines."""
    first, last = f"<!-- {study.grid.path.as_posix()} -->\n", f"<!-- end of {study.grid.path.as_posix()} -->\n"
    page = path.read_text(encoding="utf-8") if path.is_file() else ""
    if first not in page and last not in page:
        return format_study(study)
    before, found, rest = page.partition(first)
    _, ended, after = rest.partition(last)
    if not found or not ended:
        raise ValueError(f"{path} must have the line {first.strip()}, and after it {last.strip()}")
    return f"{before}{first}\n{format_study(study, level=2)}\n{last}{after}"


def write_draws(values: np.ndarray) -> str:
    """Numbers as one text, which takes less room than a list."""
    return " ".join(f"{value:.{DIGITS}g}" for value in values)


def main(arguments: argparse.Namespace | None = None) -> int:
    arguments = arguments or read_arguments()
    try:
        grid = read_grid(arguments.grid, dict(arguments.weights), arguments.results)
        runs = grid.list_runs()
        final = [run for run in runs if not run.is_tuning]
        if not arguments.closed and (missing := open_test(grid, final, arguments)):
            print(
                f"{len(missing)} finished runs have no {grid.study.subset} scores, because the weights that their "
                f"results are about are not in {arguments.runs}, such as {missing[0]}",
                file=sys.stderr,
            )
        study: Study = gather_study(grid, CostCounter(grid))
        if arguments.output is None:
            print(format_study(study))
        else:
            text = fill_page(arguments.output, study)
            with whole_file(arguments.output) as file:
                file.write(text.encode())
        if arguments.plots is not None:
            for path in draw_plots(study, arguments.plots):
                print(f"plot: {path}")
    except GridError as error:
        print(f"tabulate: {error}", file=sys.stderr)
        return WRONG_USE
    except (OSError, ValueError, WorkerError) as error:
        print(f"tabulate: {error}", file=sys.stderr)
        return ERROR
    return DONE


if __name__ == "__main__":
    sys.exit(main(ARGUMENTS))
