"""Picture of measured cases: speed-up against the share of multiply-adds that is left."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from idlevit_mm.analysis.benchmark_report import geometric_mean, speedup
from idlevit_mm.analysis.measuring import Result
from idlevit_mm.errors import UsageError
from idlevit_mm.visualization.sheets import COLOURS

_DPI = 150
_COLUMNS = 3
_DIAGONAL = 'every saved operation\nis saved time'
_MARKERS = 'osD^vP*Xh<'
# Yellow and light grey of the palette are too pale for lines on white.
_LINES = [(r, g, b) for r, g, b in COLOURS if 0.3 * r + 0.59 * g + 0.11 * b < 190]
_ROUND = (*(0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 10),)

# (share of multiply-adds, speed-up) of one candidate in one case.
Point = tuple[float, float]


def curves(results: Sequence[Result]) -> dict[str, dict[str, dict[str, list[Point]]]]:
    """Points of all idle candidates.

    Returns:
        ``{panel: {model: {candidate: points}}}``: a panel for each part, mode, dtype,
        compilation and device, a model for each target and scope, a point for each case.
    """
    panels: dict[str, dict[str, dict[str, list[Point]]]] = {}
    for result in results:
        case = result.case
        title = f'{case.part} {case.mode}, {case.dtype}'
        title += '' if case.compile == 'none' else f', compile {case.compile}'
        title += f', {case.device}' if case.device != 'cpu' else f', CPU, {case.threads} threads'
        idle = [e.label for e in result.entries if e.label.kind == 'idle']
        for entry in result.entries:
            label, row = entry.label, entry.row
            if row is None or label.name == result.reference:
                continue
            if label.kind == 'idle':
                scopes = [label.scope]
            elif label.kind == 'dense':  # all scopes are the same where every token is kept
                scopes = [other.scope for other in idle if other.target == label.target] or [None]
            else:
                continue
            point = row.operation_ratio, speedup(entry).median
            for scope in dict.fromkeys(scopes):
                line = label.target + ('' if scope is None else f', {scope}')
                model = panels.setdefault(title, {}).setdefault(line, {})
                model.setdefault(label.name, []).append(point)
    return panels


def mean_curve(model: dict[str, list[Point]]) -> list[Point]:
    """One point per candidate, geometric means over its cases, from all to few multiply-adds."""
    means = [
        (geometric_mean([x for x, _ in points]), geometric_mean([y for _, y in points]))
        for points in model.values()
    ]
    return sorted(means, reverse=True)


def plot(results: Sequence[Result], path: Path) -> None:
    """Draw one panel per kind of measurement, one line per model, both axes logarithmic.

    Args:
        results: measured cases.
        path: of the PNG file.

    Raises:
        UsageError: no idle candidate was measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = curves(results)
    if not panels:
        raise UsageError('--plot: no keep ratio was measured against a reference')
    names = list(dict.fromkeys(name for models in panels.values() for name in models))
    columns = min(_COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(5.2 * columns + 1.8, 4.6 * rows), layout='constrained')
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, (title, models) in zip(grid.flat, panels.items(), strict=False):
        _panel(axes, title, models, names)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    handles: dict[str, Any] = {}
    for axes in grid.flat[: len(panels)]:
        for handle, name in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(name, handle)
    figure.legend(list(handles.values()), list(handles), loc='outside right upper', fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI)


def _panel(
    axes: Any, title: str, models: dict[str, dict[str, list[Point]]], names: list[str]
) -> None:
    """One kind of measurement: faint points for cases, lines for their means."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    points = [p for model in models.values() for all_of in model.values() for p in all_of]
    left = min(0.95 * min(x for x, _ in points), 0.9)
    low = min(0.95 * min(y for _, y in points), 0.95)
    high = max(1.08 * max(y for _, y in points), 1 / left)
    axes.plot(
        [1, left], [1, 1 / left], '--', color='0.45', label='every saved operation\nis saved time'
    )
    axes.axhline(1, color='0.8', linewidth=0.8, zorder=0)
    for name, model in models.items():
        index = names.index(name)
        colour = tuple(part / 255 for part in _LINES[index % len(_LINES)])
        marker = _MARKERS[index % len(_MARKERS)]
        for case in model.values():
            axes.plot(*zip(*case, strict=True), marker, color=colour, alpha=0.25, markersize=4)
        mean = mean_curve(model)
        axes.plot(*zip(*mean, strict=True), marker + '-', color=colour, label=name)
    axes.set_xscale('log')
    axes.set_yscale('log')
    axes.set_xlim(max(1.03, 1.03 * max(x for x, _ in points)), left)
    axes.set_ylim(low, high)
    axes.set_xticks([tick / 10 for tick in range(1, 11) if left <= tick / 10])
    axes.set_yticks(_ticks(low, high))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{100 * value:.0f} %'))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:.3g}×'))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel('multiply-adds left, share of the reference')
    axes.set_ylabel('speed-up against the reference')


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers on a logarithmic axis, not too many."""
    steps = [
        0.25,
        0.5,
        0.6,
        0.7,
        0.8,
        0.9,
        1,
        1.2,
        1.4,
        1.6,
        1.8,
        2,
        2.5,
        3,
        4,
        5,
        6,
        8,
        10,
        15,
        20,
    ]
    inside = [step for step in steps if low <= step <= high]
    return inside if len(inside) <= 12 else inside[:: math.ceil(len(inside) / 12)]
