"""The file of ``gpu.py``, JSON lines with a run or a case each; its tables and picture."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from idlevit_mm.analysis.results import Line, markdown, read_lines

# A line is a run (machine, versions, command) or a case: its conditions, and what came out.

CONDITIONS = ('what', 'model', 'device', 'images', 'dtype', 'keep', 'mode')
KEEPS = 1.0, 0.7, 0.5
HOST = "mmdet's dense"
_TIMED = HOST, *(f'keep {keep:g}' for keep in KEEPS)
_COUNTED = (
    'One forward pass. Bytes are what operations read and write, launches what the profiler saw '
    'the GPU run; on a CPU they are operations.'
)
_TIMING = (
    'ms per image, in brackets the speed-up against our own keep 1 and, where it is there, against '
    "mmdet's dense class: medians over rounds, in which all take turns. Ours are wholly in half "
    "precision, mmdet's class under autocast with weights in half precision: its Swin can do no "
    'other.'
)


def case(
    what: str,
    model: str,
    device: str,
    images: tuple[int, ...],
    dtype: str = 'bf16',
    keep: float | None = None,
    mode: str | None = None,
) -> Line:
    """Conditions of a case, on images of (batch, height, width)."""
    values = what, model, device, list(images), dtype, keep, mode
    return dict(zip(CONDITIONS, values, strict=True))


def key_of(line: Line) -> str:
    """The conditions of a case, or all of a run, as one text."""
    return json.dumps([line[name] for name in CONDITIONS] if 'what' in line else line)


def failures(path: Path) -> dict[str, str | None]:
    """Why the cases in a file failed, None for those that did not, by their conditions."""
    lines = read_lines(path, key_of)
    return {key_of(line): line['error'] for line in lines if 'what' in line}


def told(line: Line) -> str:
    """A case in one line."""
    conditions = [line['what'], line['model'], line['dtype'], _images(line), line['mode'] or '']
    conditions += [] if line['keep'] is None else [f'keep {line["keep"]:g}']
    return f'{" ".join(filter(None, conditions))}: {_outcome(line)}'


def _outcome(line: Line) -> str:
    if line['error']:
        return f'FAILED: {line["error"]}'
    if line['what'] in ('parity', 'gradients'):
        shared = f'{line["shared"]:.2%} of the tokens as in float32'
        return f'{line["backend"]}, error {line["relative_error"]:.1e}, {shared}'
    if line['what'] == 'traffic':
        return f'{line["bytes"] / 1e9:.3f} GB, {_launches(line)} launches'
    return ', '.join(f'{name} {own["ms"][0]:.2f} ms' for name, own in line['candidates'].items())


def _images(line: Line) -> str:
    return '×'.join(map(str, line['images']))


def _launches(line: Line) -> int:
    """Those of the GPU, or operations where none was seen."""
    return line['launches'] or line['operations']


def write(path: Path, folder: Path) -> str:
    """Write ``report.md`` and ``times.png`` of a file into a folder; what to print."""
    lines = read_lines(path, key_of)
    text = document(lines)
    (folder / 'report.md').write_text(text, encoding='utf-8')
    try:
        plot(lines, folder / 'times.png')
    except ImportError:
        return f'{text}\nno picture: matplotlib is not installed'
    return text


def document(lines: Iterable[Line]) -> str:
    """Tables for a document: machines, parity, traffic and times, by device, and what failed."""
    runs = [line for line in lines if 'what' not in line]
    cases = [line for line in lines if 'what' in line]
    texts = [*dict.fromkeys(f'- {run["machine"]}; {run["versions"]}' for run in runs), '']
    for device in dict.fromkeys(line['device'] for line in cases):
        own = [line for line in cases if line['device'] == device]
        # A traceback or a half-measured case has no figures.
        by_kind = {
            kind: [line for line in own if line['what'] == kind and _RESULT[kind] in line]
            for kind in _RESULT
        }
        texts += [f'## {device}', '', '**Kernels against float32**', '']
        head = ['model', 'images', 'of', 'type', 'keep', 'backend', 'kernels', 'error', 'tokens']
        head += ["PyTorch's error", 'tokens', '']
        checked = [*by_kind['parity'], *by_kind['gradients']]
        texts += [markdown(head, map(_parity_row, checked)), '', '**Traffic**', '']
        texts += [_COUNTED, '']
        head = ['model', 'images', 'GB', 'at 0.5', 'ratio', 'launches', 'at 0.5', 'ratio']
        head += ['GPU busy, ms', 'at 0.5']
        texts += [markdown(head, _traffic_rows(by_kind['traffic'])), '']
        if rows := list(_kernel_rows(by_kind['traffic'])):
            head = ['model', 'images', 'keep', 'kernels that take longest: ms (launches)']
            texts += [markdown(head, rows), '']
        texts += ['**Times**', '']
        texts += [_TIMING, '']
        head = ['model', 'images', 'how', *_TIMED]
        texts += [markdown(head, map(_times_row, by_kind['times'])), '']
        texts += [f'- failed: {told(line)}' for line in own if line['error']]
        texts += dict.fromkeys(f'- note: {line["note"]}' for line in own if line.get('note'))
    return '\n'.join([*texts, ''])


# By kind of case a result that is there if there are any.
_RESULT = dict(
    parity='relative_error', gradients='relative_error', traffic='bytes', times='candidates'
)
# Kernels of a pass that are listed by name.
_LISTED = 8


def _parity_row(line: Line) -> list[str]:
    numbers = [
        f'{line[f"{own}relative_error"]:.1e} {line[f"{own}shared"]:.4f}' for own in ('', 'plain_')
    ]
    keep, verdict = f'{line["keep"]:g}', 'FAILED' if line['error'] else 'ok'
    of = dict(parity='maps', gradients='gradients')[line['what']]
    where = [line['model'], _images(line), of, line['dtype'], keep, line['backend']]
    return [*where, str(line['kernels']), *' '.join(numbers).split(), verdict]


def _traffic_rows(lines: Iterable[Line]) -> Iterator[list[str]]:
    """A row for each model and size of which both ratios are there."""
    pairs: dict[tuple[str, str], dict[float, Line]] = {}
    for line in lines:
        pairs.setdefault((line['model'], _images(line)), {})[line['keep']] = line
    for names, found in pairs.items():
        if len(found) < 2:
            continue
        dense, half = found[1.0], found[0.5]
        row = [*names]
        for form, one, other in (
            ('.3f', dense['bytes'] / 1e9, half['bytes'] / 1e9),
            ('d', _launches(dense), _launches(half)),
        ):
            row += [format(one, form), format(other, form), f'{other / one:.2f}']
        busy = [line['busy_ms'] for line in (dense, half)]
        yield [*row, *('–' if ms is None else f'{ms:.2f}' for ms in busy)]


def _kernel_rows(lines: Iterable[Line]) -> Iterator[list[str]]:
    """A row for each pass that a GPU has run."""
    for line in lines:
        taken = sorted(line.get('by_kernel', {}).items(), key=lambda item: -item[1][1])
        texts = [f'{name[:40]} {ms:.3f} ({number})' for name, (number, ms) in taken[:_LISTED]]
        if texts:
            yield [line['model'], _images(line), f'{line["keep"]:g}', ', '.join(texts)]


def _times_row(line: Line) -> list[str]:
    cells = []
    for name in _TIMED:
        own = line['candidates'].get(name, {})
        speedups = ', '.join(f'{own[key][0]:.2f}' for key in ('own', 'host') if key in own)
        cells.append(f'{own["ms"][0]:.2f} ({speedups})' if 'ms' in own else '–')
    return [line['model'], _images(line), line['mode'], *cells]


def plot(lines: Iterable[Line], path: Path) -> None:
    """Draw ms per image by keep ratio, a panel per model and size, a line per way to run it.

    Nothing is drawn where nothing was timed.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    panels: dict[tuple[str, ...], list[Line]] = {}
    for line in lines:
        if line.get('candidates'):
            panels.setdefault((line['device'], _images(line), line['model']), []).append(line)
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.2 * columns + 1.6, 3.6 * rows), layout='constrained')
    grid = figure.subplots(rows, columns, squeeze=False).flat
    handles: dict[str, Any] = {}
    for axes, ((device, images, model), own) in zip(grid, panels.items(), strict=False):
        for line in own:
            colour = f'C{["eager", "captured", "compiled"].index(line["mode"])}'
            found = {name: c['ms'][0] for name, c in line['candidates'].items() if 'ms' in c}
            names = {keep: f'keep {keep:g}' for keep in KEEPS}
            points = {keep: found[name] for keep, name in names.items() if name in found}
            drawn = axes.plot(list(points), list(points.values()), 'o-', color=colour)
            (handles[line['mode']],) = drawn
            if HOST in found:
                label = f'{HOST}, {line["mode"]}'
                handles[label] = axes.axhline(found[HOST], linestyle='--', color=colour)
        axes.set_title(f'{model}, {images}\n{device}', fontsize=9)
        axes.set(xlabel='keep ratio', ylabel='ms per image', xlim=(1.03, 0.47), ylim=(0, None))
        axes.grid(alpha=0.3)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    figure.legend(list(handles.values()), list(handles), loc='outside right upper', fontsize=9)
    figure.savefig(path, dpi=150)
