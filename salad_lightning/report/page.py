"""One HTML file that needs nothing else: no script, no network."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from salad_lightning import __version__
from salad_lightning.report.figures import causes_figure, gap_figure, loss_figure, selection_figure, speed_figure
from salad_lightning.report.run_folder import RunFolder

__all__ = ["render_page"]

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1b1b1f; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ccc; }
img { max-width: 100%; height: auto; } .wide { overflow-x: auto; }
table { border-collapse: collapse; margin: .6rem 0; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #e4e4e8; text-align: right; overflow-wrap: anywhere; }
th:first-child, td:first-child { text-align: left; min-width: 14rem; }
p, footer { color: #55555e; } code { font-size: .9em; }
"""
_SPEED = {
    "train/tokens_per_second": ("tokens a second, median", "{:,.0f}"),
    "train/audio_seconds_per_second": ("seconds of speech a second, median", "{:,.1f}"),
    "train/padding_share": ("padding", "{:.1%}"),
    "train/data_wait_share": ("waiting for data", "{:.1%}"),
    "train/mfu": ("model FLOPs utilisation", "{:.1%}"),
    "train/peak_memory_gib": ("peak memory, GiB", "{:.2f}"),
}
_MOST_DIFFERENCES = 40


def render_page(runs: Sequence[RunFolder], title: str) -> str:
    """The page.

    Args:
        runs: At least one; each has a column in every table.
        title: Its heading.
    """
    parts = [
        ("Data and speed", _speed_table(runs), [speed_figure(runs)], ""),
        ("Loss", "", [loss_figure(runs)], ""),
        (
            "Misalignment and forgetting",
            "",
            [causes_figure(runs)],
            "M: the adapted model on text against itself on speech. F: the base LLM against the adapted one, on text.",
        ),
        (
            "Evaluation",
            _accuracy_table(runs),
            [gap_figure(runs)],
            "Gap: accuracy of the base LLM on text − of the adapted model on speech, with its 95 % interval.",
        ),
        *((f"Selection: {run.name}", "", [selection_figure(run)], "") for run in runs if run.selection),
        ("Settings that differ", _differences(runs), [], ""),
    ]
    body = [f"<h1>{html.escape(title)}</h1>"]
    for heading, table, figures, note in parts:
        images = [_image(figure, heading) for figure in figures if figure is not None]
        if table or images:
            body += [f"<h2>{html.escape(heading)}</h2>", f"<p>{html.escape(note)}</p>" if note else "", table, *images]
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(filter(None, body))
        + f"\n<footer>salad-lightning {__version__}</footer>\n</body>\n</html>\n"
    )


def _speed_table(runs: Sequence[RunFolder]) -> str:
    rows: list[tuple[str, list[str]]] = []
    for key, label, form in (
        ("steps", "optimizer steps", "{:,.0f}"),
        ("tokens", "tokens trained on", "{:,.0f}"),
        ("audio_seconds", "hours of speech", "{:,.2f}"),
        ("trainable_parameters", "trained parameters", "{:,.0f}"),
        ("seconds", "seconds of training", "{:,.0f}"),
    ):
        scale = 3600 if key == "audio_seconds" else 1
        rows.append((label, [form.format(run.fit[key] / scale) if key in run.fit else "" for run in runs]))
    for column, (label, form) in _SPEED.items():
        values = [run.last(column) for run in runs]
        rows.append((label, ["" if value is None else form.format(value) for value in values]))
    return _table(runs, rows)


def _accuracy_table(runs: Sequence[RunFolder]) -> str:
    """Accuracy of every task and row, M and F; from ``evaluation.json``, else from ``test.json``."""
    cells: dict[str, dict[str, str]] = {}
    for run in runs:
        for label, value in _figures(run):
            cells.setdefault(label, {})[run.name] = value
    return _table(runs, [(label, [row.get(run.name, "") for run in runs]) for label, row in cells.items()])


def _figures(run: RunFolder) -> list[tuple[str, str]]:
    found = []
    if run.evaluation:
        for name, task in run.evaluation["tasks"].items():
            for label, row in task["rows"].items():
                low, high = row["interval"]
                found.append((f"{name}: {label}", f"{row['accuracy']:.3f} ({low:.3f} – {high:.3f})"))
            found += [
                (f"{name}: {cause}", f"{task[cause]:.3f}") for cause in ("misalignment", "forgetting") if cause in task
            ]
        return found
    for name, entry in run.test.items():
        for figure, value in entry["all"].items():
            interval = entry.get("intervals", {}).get(figure)
            range_ = f" ({interval[0]:.3f} – {interval[1]:.3f})" if interval else ""
            found.append((f"{name}: {figure.replace('_', ' ')}", f"{value:.3f}{range_}"))
    return found


def _differences(runs: Sequence[RunFolder]) -> str:
    known = [run for run in runs if run.settings]
    keys = list(dict.fromkeys(key for run in known for key in run.settings))
    rows = [(key, [run.settings.get(key, "") for run in runs]) for key in keys
            if len({run.settings.get(key, "") for run in known}) > 1]  # fmt: skip
    more = f"<p>… and {len(rows) - _MOST_DIFFERENCES} more</p>" if len(rows) > _MOST_DIFFERENCES else ""
    return _table(runs, rows[:_MOST_DIFFERENCES]) + more


def _table(runs: Sequence[RunFolder], rows: Sequence[tuple[str, list[str]]]) -> str:
    shown = [(label, values) for label, values in rows if any(values)]
    if not shown:
        return ""
    # A selection has no accuracies, a run no clusters: a column of dashes would say nothing.
    columns = [column for column in range(len(runs)) if any(values[column] for _, values in shown)]
    head = "".join(f"<th>{html.escape(runs[column].name)}</th>" for column in columns)
    lines = [
        f"<tr><td>{html.escape(label)}</td>"
        + "".join(f"<td>{html.escape(values[column]) or '–'}</td>" for column in columns)
        + "</tr>"
        for label, values in shown
    ]
    return f'<div class="wide"><table>\n<tr><th></th>{head}</tr>\n' + "\n".join(lines) + "\n</table></div>"


def _image(figure: Figure, name: str) -> str:
    buffer = io.BytesIO()
    # As an image of its own: names inside one drawing cannot meet those of another.
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    plt.close(figure)
    content = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{html.escape(name)}" src="data:image/svg+xml;base64,{content}">'
