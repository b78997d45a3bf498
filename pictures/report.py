"""A report on runs as one page of HTML that needs no network: tables, plots and panels.

Plots are made with Plotly (MIT), because it is one library for all of them that draws in the page, with values under
the pointer, and can be put into the page as a whole: Vega would need three scripts and a compiler. It has 4.8 MB, and a
page at most LIMIT; panels that do not fit are left out, and the page says so.
"""

import base64
import html
import io
import json
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import yaml
from PIL import Image
from plotly.offline import get_plotlyjs
from tqdm import tqdm

from experiment import Trained
from pictures.curves import COLORS, collect_curves, read_log
from pictures.frames import make_panel
from pictures.panel import draw_panel, render_figure
from scoring.table import collect_rows, list_tables
from training.files import whole_file
from training.run import flatten_config

LIMIT = 8_000_000  # bytes
PANEL_WIDTH = 1300  # pixels
RANKS = ("best", "median", "worst")

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 1200px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.6em } h2 { font-size: 1.25em; margin-top: 2em; border-bottom: 1px solid #ccc }
h3 { font-size: 1.05em } .grid > div { min-width: 0 }
.grid { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 0 1em }
@media (max-width: 900px) { .grid { grid-template-columns: minmax(0, 1fr) } }
table { border-collapse: collapse; font-size: 13px; margin: .5em 0 } th, td { padding: 3px 9px; text-align: left }
th { border-bottom: 1px solid #222; white-space: nowrap } td { border-bottom: 1px solid #eee }
table.sortable th { cursor: pointer } table.sortable td { white-space: nowrap }
th[aria-sort=ascending]::after { content: " \\25B2" }
th[aria-sort=descending]::after { content: " \\25BC" }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.note { color: #555; font-size: 13px } img { max-width: 100%; border: 1px solid #ddd } .wide { overflow-x: auto }
"""

SORT = """
for (const table of document.querySelectorAll("table.sortable")) {
  table.querySelectorAll("th").forEach((head, column) => {
    head.tabIndex = 0;
    const sort = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        const [p, q] = [parseFloat(x), parseFloat(y)];
        if (isNaN(p) !== isNaN(q)) return isNaN(p) ? 1 : -1;
        const order = isNaN(p) ? x.localeCompare(y) : p - q;
        return up ? order : -order;
      });
      table.tBodies[0].append(...rows);
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", event => { if (event.key === "Enter") sort(); });
  });
}
"""

Cell = tuple[str, float | None] | str
"""What a cell shows, and, of a number, its value."""


def as_cell(text: str) -> Cell:
    """A number where the text is one."""
    try:
        return text, float(text)
    except ValueError:
        return text


def make_table(header: Sequence[str], rows: Sequence[Sequence[Cell]], sortable: bool = True) -> str:
    heads = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = []
    for row in rows:
        cells = []
        for cell in row:
            if isinstance(cell, tuple):
                text, value = cell
                data = "" if value is None else f' data-value="{value!r}"'
                cells.append(f'<td class="number"{data}>{html.escape(text)}</td>')
            else:
                cells.append(f"<td>{html.escape(cell).replace(' .. ', '&nbsp;..&nbsp;')}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    kind = ' class="sortable"' if sortable else ""
    return f'<div class="wide"><table{kind}><thead><tr>{heads}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def write_report(path: Path, done: Any, device: Any) -> int:
    """Write the page, whole or not at all; `done`: an Evaluation. Returns its size in bytes."""
    runs = list(done.outcomes)
    colors = {run: COLORS[place % len(COLORS)] for place, run in enumerate(runs)}
    sections = [
        describe_scores(done),
        _draw_scores(done, colors),
        _describe_comparison(done.comparison),
        _draw_details(done, colors),
        _draw_curves(done, colors),
        _describe_runs(done),
    ]
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Report</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><script>{get_plotlyjs()}</script></head><body>"
        f"<h1>Report on {len(runs)} run{'s' * (len(runs) != 1)}</h1>"
    )
    tail = f"<script>{SORT}</script></body></html>\n"
    used = sum(len(part.encode()) for part in [head, *sections, tail])
    panels = _draw_panels(done, device, LIMIT - used - 10_000)
    page = "\n".join([head, *sections, panels, tail]).encode()
    with whole_file(path) as file:
        file.write(page)
    return len(page)


# Plotly's other buttons include one that uploads the plot to a server
BUTTONS = {"modeBarButtons": [["toImage", "zoom2d", "resetScale2d"]], "displaylogo": False, "plotlyServerURL": ""}


def _embed(figure: go.Figure, height: int = 360) -> str:
    figure.update_layout(
        template="plotly_white", height=height, margin={"l": 60, "r": 20, "t": 40, "b": 50}, font={"size": 12},
        legend={"orientation": "h", "y": -0.25},
    )  # fmt: skip
    plot = figure.to_html(full_html=False, include_plotlyjs=False, config=BUTTONS | {"responsive": True})
    return f"<div>{plot}</div>"


def _arrange(plots: Sequence[str]) -> str:
    """Plots side by side, as many as the window is wide enough for."""
    return f'<div class="grid">{"".join(plots)}</div>'


def describe_scores(done: Any) -> str:
    """The table of all scores, with the errors and all notes, as HTML; `done`: an Evaluation."""
    header, rows, notes = collect_rows(done.scores, {run: outcome.cost for run, outcome in done.outcomes.items()})
    listed = "".join(f"<li>{html.escape(note)}</li>" for note in [*notes, *done.notes])
    errors = "".join(f"<li><b>{html.escape(error)}</b></li>" for error in done.errors)
    table = make_table(header, [[as_cell(text) for text in row] for row in rows])
    return f'<h2>Scores</h2>{table}<ul class="note">{errors}{listed}</ul>'


def _list_tasks(done: Any) -> list[str]:
    return list(dict.fromkeys(task for outcome in done.outcomes.values() for task in outcome.scores))


def _draw_scores(done: Any, colors: Mapping[str, str]) -> str:
    parts = []
    for task in _list_tasks(done):
        scores = {run: outcome.scores[task] for run, outcome in done.outcomes.items() if task in outcome.scores}
        scores = {run: score for run, score in scores.items() if score["score"] is not None}
        if not scores:
            continue
        figure = go.Figure()
        for run, score in scores.items():
            low, high = score.get("interval") or (score["score"], score["score"])
            figure.add_trace(
                go.Scatter(
                    x=[score["score"]], y=[run], mode="markers", marker={"size": 10, "color": colors[run]}, name=run,
                    showlegend=False,
                    error_x={
                        "type": "data", "symmetric": False, "array": [high - score["score"]],
                        "arrayminus": [score["score"] - low],
                    },
                )
            )  # fmt: skip
        constants = {run: score["constant"] for run, score in scores.items() if score["constant"] is not None}
        if constants:
            run, value = next(iter(constants.items()))
            whose = f" of {run}" * (len({*constants.values()}) > 1)
            figure.add_vline(x=value, line_dash="dash", annotation_text=f"constant baseline{whose}")
        first = next(iter(scores.values()))
        title = f"{task}: {first['headline']}, {first['better']} is better"
        figure.update_layout(title=title, yaxis={"autorange": "reversed"})
        parts.append(_embed(figure, 140 + 32 * len(done.outcomes)))
    known = [score.get("interval") for outcome in done.outcomes.values() for score in outcome.scores.values()]
    bars = '<p class="note">Bars: 95 % intervals.</p>' * any(known)
    return f"<h2>Primary metrics</h2>{bars}" + _arrange(parts)


def _describe_comparison(comparison: Mapping[str, Any]) -> str:
    parts = []
    for table in list_tables(comparison):
        rows = [[as_cell(text) for text in row] for row in table.rows]
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
        parts.append(f"<h3>{html.escape(table.title)}</h3>{make_table(table.header, rows)}")
        parts.append(f'<ul class="note">{notes}</ul>')
    return "<h2>Comparison</h2>" + "".join(parts) if parts else ""


def _bars(done: Any, colors: Mapping[str, str], task: str, title: str, pick: Callable[[str], str | None]) -> str:
    """Bars of those metrics of a task that `pick` gives a name, None for the others; a colour for each run."""
    figure = go.Figure()
    for run, outcome in done.outcomes.items():
        metrics = outcome.scores.get(task, {}).get("metrics", {})
        named = [(pick(name), value) for name, value in metrics.items() if value is not None]
        named = [(name, value) for name, value in named if name is not None]
        if named:
            names, values = zip(*named, strict=True)
            figure.add_trace(go.Bar(x=names, y=values, name=run, marker_color=colors[run]))
    if not figure.data:
        return ""
    figure.update_layout(title=title, barmode="group")
    return _embed(figure)


def _after(prefix: str) -> Callable[[str], str | None]:
    return lambda name: name.removeprefix(prefix) if name.startswith(prefix) else None


def _draw_details(done: Any, colors: Mapping[str, str]) -> str:
    """The metrics of each task by class, range and kind of error, as the tasks name them; and what they describe."""
    parts = []
    for task in _list_tasks(done):
        found = [outcome.scores[task]["metrics"] for outcome in done.outcomes.values() if task in outcome.scores]
        groups = dict.fromkeys(name.partition("/")[0] for metrics in found for name in metrics if "/" in name)
        titles = next(source.tasks[task] for source in done.sources.values() if task in source.tasks).group_titles
        plots = [_bars(done, colors, task, titles.get(group, group), _after(f"{group}/")) for group in groups]
        for run, outcome in done.outcomes.items():
            details = outcome.details.get(task, {})
            if "confusion" in details:
                plots.append(_draw_confusion(run, details))
        curves = {
            run: outcome.details[task]["precision"]
            for run, outcome in done.outcomes.items()
            if "precision" in outcome.details.get(task, {})
        }
        plots += _draw_precision(curves, colors)
        if any(plots):
            parts.append(f"<h3>{html.escape(task)}</h3>{_arrange(plots)}")
    return "<h2>By class, range and kind of error</h2>" + "".join(parts)


def _draw_confusion(run: str, details: Mapping[str, Any]) -> str:
    classes, matrix = details["classes"], details["confusion"]
    rows = [(name, counts) for name, counts in zip(classes, matrix, strict=True) if sum(counts)]
    columns = [*classes, "none"]
    used = [place for place in range(len(columns)) if any(counts[place] for _, counts in rows)]
    shares = [[round(counts[place] / sum(counts), 4) for place in used] for _, counts in rows]
    figure = go.Figure(
        go.Heatmap(
            z=shares, x=[columns[place] for place in used], y=[name for name, _ in rows], colorscale="Viridis", zmin=0,
            zmax=1, hovertemplate="labelled %{y}, predicted %{x}: %{z:.1%}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(title=f"{run}: confusion matrix, shares of a row")
    figure.update_yaxes(title="ground truth", autorange="reversed", automargin=True)
    figure.update_xaxes(title="prediction", automargin=True)
    return _embed(figure, 160 + 24 * len(rows))


def _draw_precision(curves: Mapping[str, Mapping[str, list[float]]], colors: Mapping[str, str]) -> list[str]:
    plots = []
    recalls = [round(step / 100, 2) for step in range(101)]
    for name in dict.fromkeys(name for own in curves.values() for name in own):
        figure = go.Figure()
        for run, own in curves.items():
            if name in own:
                figure.add_trace(go.Scatter(x=recalls, y=own[name], name=run, line={"color": colors[run]}))
        figure.update_layout(title=f"precision over recall at IoU 0.5: {name}")
        figure.update_xaxes(title="recall", range=[0, 1])
        figure.update_yaxes(title="precision", range=[0, 1.02])
        plots.append(_embed(figure, 320))
    return plots


def _find_folder(source: Any) -> Path | None:
    """The run folder that weights come from, if they lie in one."""
    folder = source.path.parent if isinstance(source, Trained) else None
    return folder if folder is not None and (folder / "config.yaml").is_file() else None


def _draw_curves(done: Any, colors: Mapping[str, str]) -> str:
    fields: dict[str, list[tuple[str, str, list[int], list[float]]]] = {}
    for run in done.outcomes:
        folder = _find_folder(done.sources[run])
        if folder is None:
            continue
        try:
            curves = collect_curves(read_log(folder))
        except ValueError:
            continue
        for name, own in curves.items():
            for curve, (steps, values) in own.items():
                fields.setdefault(name, []).append((run, curve, steps, values))
    parts = []
    for name, members in fields.items():
        figure = go.Figure()
        several = len({curve for _, curve, _, _ in members}) > 1
        dashes = ("solid", "dash", "dot", "dashdot")
        order = list(dict.fromkeys(curve for _, curve, _, _ in members))
        for run, curve, steps, values in members:
            title = f"{run}, {curve}" if several else run
            line = {"color": colors[run], "dash": dashes[order.index(curve) % len(dashes)], "width": 1.5}
            rounded = [float(f"{value:.5g}") for value in values]
            figure.add_trace(go.Scatter(x=steps, y=rounded, name=title, line=line))
        figure.update_layout(title=name)
        figure.update_xaxes(title="step")
        parts.append(_embed(figure, 320))
    return "<h2>Training</h2>" + _arrange(parts) if parts else ""


def _describe_runs(done: Any) -> str:
    configs, facts = {}, {}
    for run in done.outcomes:
        source = done.sources[run]
        folder = _find_folder(source)
        header = source.header
        facts[run] = {
            "step": str(header.get("step")),
            "frames trained on": str(len(source.record.subsets["train"])) if source.record else "unknown",
        }
        if folder is None:
            continue
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        configs[run] = {key: json.dumps(value, ensure_ascii=False) for key, value in flatten_config(config).items()}
        try:
            environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            environment = {}
        facts[run] |= {"seed": configs[run].get("seed", "")}
        facts[run] |= {
            key: value if isinstance(value, str) else json.dumps(value) for key, value in environment.items()
        }
    parts = ["<h2>Runs</h2>"]
    names = list(dict.fromkeys(name for own in facts.values() for name in own))
    rows: list[list[Cell]] = [[name, *(facts[run].get(name, "") for run in facts)] for name in names]
    parts.append(make_table(["", *facts], rows, sortable=False))
    if len(configs) > 1:
        keys = dict.fromkeys(key for own in configs.values() for key in own)
        # what belongs to a task that a run does not have is no difference of its own
        differing = [key for key in keys if len({own[key] for own in configs.values() if key in own}) > 1]
        rows = [[key, *(own.get(key, "") for own in configs.values())] for key in differing]
        parts.append("<h3>Differences of the configs</h3>")
        tasks = [", ".join(done.sources[run].tasks) for run in configs]
        parts.append(make_table(["key", *configs], [["tasks", *tasks], *rows], sortable=False))
    machine = f"Python {platform.python_version()}, {platform.platform()}"
    command = " ".join(["python", *sys.argv])
    parts.append(f'<p class="note">This page: {html.escape(command)}; {html.escape(machine)}</p>')
    return "".join(parts)


def choose_ranks(values: Sequence[tuple[str, float]], better: str) -> dict[str, str]:
    """The best, the median and the worst frame, of (frame, score)."""
    ranked = [frame for frame, _ in sorted(values, key=lambda pair: pair[1], reverse=better == "higher")]
    return {"best": ranked[0], "median": ranked[(len(ranked) - 1) // 2], "worst": ranked[-1]} if ranked else {}


def _draw_panels(done: Any, device: Any, room: int) -> str:
    """For each task the best, the median and the worst frame of the first run that has it, with all runs that have."""
    frames = {str(frame): frame for frame in done.frames}
    wanted = []
    for task in _list_tasks(done):
        having = [run for run, outcome in done.outcomes.items() if task in outcome.results]
        if not having:
            continue
        score = done.outcomes[having[0]].scores[task]
        pairs = zip(score["scored_frames"], score["frame_scores"], strict=True)
        known = [(frame, value) for frame, value in pairs if value is not None]
        wanted += [(task, having, rank, frame) for rank, frame in choose_ranks(known, score["better"]).items()]
    parts, left_out = [], 0
    for task, having, rank, frame in tqdm(wanted, desc="panels", unit="panel", leave=False):
        sources = {run: done.sources[run] for run in having}
        panel = make_panel(frames[frame], done.data, sources, device, [task])
        for source in sources.values():
            if isinstance(source, Trained):
                source.net.cpu()  # a GPU need not hold the networks of all runs
        picture = Image.fromarray(render_figure(draw_panel(panel), PANEL_WIDTH))
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=82)
        text = base64.b64encode(buffer.getvalue()).decode()
        if len(text) > room:
            left_out += 1
            continue
        room -= len(text) + 500
        title = f"{task}: {rank} frame of the run {having[0]}, {frame}"
        parts.append(
            f'<h3>{html.escape(title)}</h3><img alt="{html.escape(title)}" src="data:image/jpeg;base64,{text}">'
        )
    if left_out:
        parts.append(f'<p class="note">{left_out} panels are left out: the page would be larger than 8 MB.</p>')
    return "<h2>Frames</h2>" + "".join(parts) if parts else ""
