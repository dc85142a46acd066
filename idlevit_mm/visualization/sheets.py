"""Pictures of what a model saw, found and left idle: one sheet per image.

A sheet shows the image, its ground truth and the prediction, a legend, and for every stage of
the backbone the tokens that were active, drawn over the image. Images are enlarged without
smoothing, so that a pixel of a small image stays a visible square.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# Okabe and Ito's seven colours and three of Paul Tol's: distinct for colour-blind readers too.
COLOURS: tuple[tuple[int, int, int], ...] = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (136, 34, 85),
    (51, 34, 136),
    (221, 221, 221),
)
Palette = Sequence[Sequence[int]]

IGNORED = 255
_MIN_SIDE = 512
_MAX_SIDE = 1024
_TITLE = 44
_GAP = 12
# Idle tokens: little contrast around a bluish middle grey, which neither a dark nor a light part
# of a photograph looks like.
_IDLE_CONTRAST = 0.25
_IDLE_TONE = (84, 90, 104)
_MIN_CELL = 6


@dataclass(frozen=True)
class Box:
    """One labelled box: corners (x1, y1, x2, y2) in pixels of the image, class, score or None."""

    corners: tuple[float, float, float, float]
    label: int
    score: float | None = None


@dataclass(frozen=True)
class Objects:
    """Boxes of one image and, for instance segmentation, their masks (N, H, W)."""

    boxes: tuple[Box, ...]
    masks: np.ndarray | None = None


@dataclass
class Panel:
    """One field of a sheet.

    Attributes:
        title: the line above the picture.
        pixels: (H, W, 3) uint8, already in display size.
        boxes: drawn over the picture, corners in display pixels.
        tags: (x, y, text) of small labels in display pixels.
        legend: (colour, text) lines, drawn in place of a picture.
    """

    title: str
    pixels: np.ndarray
    boxes: Sequence[Box] = ()
    tags: Sequence[tuple[float, float, str]] = ()
    legend: Sequence[tuple[tuple[int, int, int] | None, str]] = ()


@dataclass
class Sample:
    """What a sheet shows.

    Attributes:
        name: the file name of the picture, without a suffix.
        image: (H, W, 3) uint8, RGB.
        classes: class names by number.
        shares: per stage (Ht, Wt), the share of the stage's blocks in which a token was active.
        input_size: height and width of the network's input, padding included.
        content_size: height and width of the image within that input.
        truth: boxes, or a class map (H, W) with 255 for ignored pixels; None if unknown.
        prediction: as ``truth``.
        notes: lines at the top of the legend.
        palette: colours of the data set, (R, G, B) per class; used where there are more classes
            than ``COLOURS``.
    """

    name: str
    image: np.ndarray
    classes: Sequence[str]
    shares: Sequence[np.ndarray]
    input_size: tuple[int, int]
    content_size: tuple[int, int]
    truth: Objects | np.ndarray | None = None
    prediction: Objects | np.ndarray | None = None
    notes: Sequence[str] = ()
    palette: Palette | None = None


# --- What was active --------------------------------------------------------------------------


def stage_shares(keep_masks: Sequence[Sequence[Tensor]], index: int = 0) -> list[np.ndarray]:
    """Share of each stage's blocks in which a token was active.

    Args:
        keep_masks: a backbone's ``keep_masks``: stages, blocks, (B, Ht, Wt) bool.
        index: which image of the batch.

    Returns:
        One (Ht, Wt) float array in [0, 1] per stage.
    """
    return [
        torch.stack([mask[index].float() for mask in blocks]).mean(0).cpu().numpy()
        for blocks in keep_masks
    ]


def cell_index(
    display: int, content: int, padded: int, tokens: int, stride: int | None = None
) -> np.ndarray:
    """Which token each display pixel of one axis belongs to.

    Args:
        display: pixels shown along the axis; they show the ``content`` pixels of the input.
        content: input pixels that the image covers.
        padded: input pixels with padding.
        tokens: tokens along the axis; each covers ``stride`` input pixels.
        stride: taken as the nearest power of two when None.

    Returns:
        (display,) integers in [0, tokens).
    """
    stride = stride or 2 ** round(math.log2(padded / tokens))
    centres = (np.arange(display) + 0.5) * (content / display)
    return np.minimum((centres / stride).astype(int), tokens - 1)


def paint_active(
    image: np.ndarray, share: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Image in clear where tokens were active, greyed where they idled, with the token grid.

    Args:
        image: (H, W, 3) uint8 in display size.
        share: (Ht, Wt) in [0, 1].
        rows: (H,) token row of each display row.
        columns: (W,) token column of each display column.

    Returns:
        (H, W, 3) uint8.
    """
    clear = image.astype(np.float32)
    grey = clear @ np.array([0.299, 0.587, 0.114], np.float32)
    idle = grey[..., None] * _IDLE_CONTRAST + np.array(_IDLE_TONE, np.float32)
    weight = share[rows][:, columns][..., None].astype(np.float32)
    painted = weight * clear + (1 - weight) * idle
    smallest = min(np.bincount(rows).max(), np.bincount(columns).max())
    if smallest >= _MIN_CELL:
        # One line width, lighter for small cells, so that the grid never hides the picture.
        strength = 0.35 if smallest >= 24 else 0.22
        lines = np.zeros(image.shape[:2], bool)
        lines[1:][np.diff(rows) > 0] = True
        lines[:, 1:][:, np.diff(columns) > 0] = True
        painted[lines] = (1 - strength) * painted[lines] + strength * 255
    return painted.round().clip(0, 255).astype(np.uint8)


# --- Panels -----------------------------------------------------------------------------------


def enlarge(image: np.ndarray, nearest: bool = True) -> np.ndarray:
    """Bring the longer side to at least 512 pixels by a whole factor, or down to 1024."""
    height, width = image.shape[:2]
    longer = max(height, width)
    if longer > _MAX_SIDE:
        size = (
            max(1, round(width * _MAX_SIDE / longer)),
            max(1, round(height * _MAX_SIDE / longer)),
        )
        filter_ = Image.Resampling.NEAREST if image.ndim == 2 else Image.Resampling.BOX
        return np.asarray(Image.fromarray(image).resize(size, filter_))
    factor = -(-_MIN_SIDE // longer)
    return image.repeat(factor, axis=0).repeat(factor, axis=1) if nearest else image


def colour_of(
    label: int, classes: Sequence[str], palette: Palette | None = None
) -> tuple[int, int, int]:
    """The colour of a class.

    ``COLOURS`` where they are enough, and a leading background class takes none of them; else the
    palette of the data set, if it has one for each class.
    """
    offset = 1 if classes and classes[0].lower() == 'background' else 0
    if palette and label < len(palette) and len(classes) - offset > len(COLOURS):
        red, green, blue = palette[label]
        return int(red), int(green), int(blue)
    return COLOURS[(label - offset) % len(COLOURS)]


def object_panel(
    title: str,
    image: np.ndarray,
    objects: Objects,
    classes: Sequence[str],
    palette: Palette | None = None,
) -> Panel:
    """Boxes (and masks) over the image, corners brought to display size."""
    shown = enlarge(image)
    scale_x = shown.shape[1] / image.shape[1]
    scale_y = shown.shape[0] / image.shape[0]
    if objects.masks is not None:
        blend = shown.astype(np.float32)
        for box, mask in zip(objects.boxes, objects.masks, strict=True):
            inside = enlarge(mask.astype(np.uint8)).astype(bool)
            colour = np.array(colour_of(box.label, classes, palette))
            blend[inside] = 0.45 * blend[inside] + 0.55 * colour
        shown = blend.round().astype(np.uint8)
    boxes = [
        Box(
            (
                box.corners[0] * scale_x,
                box.corners[1] * scale_y,
                box.corners[2] * scale_x,
                box.corners[3] * scale_y,
            ),
            box.label,
            box.score,
        )
        for box in objects.boxes
    ]
    return Panel(title, shown, boxes)


def class_map_panel(
    title: str,
    image: np.ndarray,
    class_map: np.ndarray,
    classes: Sequence[str],
    palette: Palette | None = None,
) -> Panel:
    """Classes as colours over the greyed image, larger regions tagged with their names."""
    import cv2

    shown = enlarge(image).astype(np.float32)
    labels = enlarge(class_map.astype(np.uint8))
    grey = (shown @ np.array([0.299, 0.587, 0.114], np.float32))[..., None] * 0.6 + 50
    painted = np.repeat(grey, 3, axis=-1)
    tags = []
    for label in np.unique(labels):
        if label == IGNORED or label >= len(classes):
            continue
        inside = labels == label
        if classes[label].lower() == 'background':
            continue
        colour = np.array(colour_of(int(label), classes, palette))
        painted[inside] = 0.3 * painted[inside] + 0.7 * colour
        count, regions, stats, _ = cv2.connectedComponentsWithStats(inside.astype(np.uint8))
        for region in range(1, count):
            if stats[region, cv2.CC_STAT_AREA] < 0.004 * inside.size:
                continue
            distance = cv2.distanceTransform((regions == region).astype(np.uint8), cv2.DIST_L2, 3)
            y, x = np.unravel_index(distance.argmax(), distance.shape)
            tags.append((float(x), float(y), classes[label]))
    painted[labels == IGNORED] *= 0.4
    # A thin outline keeps colours apart that are alike in lightness.
    edges = np.zeros(labels.shape, bool)
    edges[1:] |= labels[1:] != labels[:-1]
    edges[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    painted[edges] = 255
    return Panel(title, painted.round().clip(0, 255).astype(np.uint8), tags=tags)


def stage_panel(sample: Sample, stage: int) -> Panel:
    """The active tokens of one stage (counted from 0) over the image."""
    share = sample.shares[stage]
    shown = enlarge(sample.image)
    # The longer axis tells the stride best: rounding up a short map distorts the quotient.
    axis = int(sample.input_size[1] > sample.input_size[0])
    stride = 2 ** round(math.log2(sample.input_size[axis] / share.shape[axis]))
    rows, columns = (
        cell_index(
            shown.shape[i], sample.content_size[i], sample.input_size[i], share.shape[i], stride
        )
        for i in (0, 1)
    )
    title = (
        f'Stage {stage + 1}: {share.shape[1]}×{share.shape[0]} tokens, '
        f'{100 * share.mean():.0f} % kept'
    )
    return Panel(title, paint_active(shown, share, rows, columns))


def legend_panel(sample: Sample, shape: tuple[int, int]) -> Panel:
    """How to read the sheet: active and idle tokens, and the colours of a class map."""
    lines: list[tuple[tuple[int, int, int] | None, str]] = [(None, note) for note in sample.notes]
    lines += [
        (None, 'Stages, in the lower row:'),
        (None, '    in colour: active in every block'),
        (None, '    greyed: idle in every block'),
        (None, '    between: active in some of the blocks'),
    ]
    present: set[int] = set()
    for content in (sample.truth, sample.prediction):
        if isinstance(content, np.ndarray):
            present |= {int(label) for label in np.unique(content)}
        elif content is not None:
            present |= {box.label for box in content.boxes}
    present = {label for label in present if 0 <= label < len(sample.classes)}
    if present:
        lines.append((None, 'Classes:'))
        lines += [
            ((150, 150, 150), sample.classes[label])
            if sample.classes[label].lower() == 'background'
            else (colour_of(label, sample.classes, sample.palette), sample.classes[label])
            for label in sorted(present)
        ]
    return Panel('', np.full((*shape, 3), 255, np.uint8), legend=lines)


# --- Sheets -----------------------------------------------------------------------------------


def sheet_panels(sample: Sample) -> list[list[Panel]]:
    """The rows of a sheet: image, ground truth, prediction and legend, then the stages."""
    picture = enlarge(sample.image)
    height, width = sample.image.shape[:2]
    first = [Panel(f'Image: {width}×{height} pixels', picture)]
    truth = sample.truth
    if isinstance(sample.prediction, Objects) and sample.prediction.masks is None:
        # A detector without masks is not compared with masks.
        truth = Objects(truth.boxes) if isinstance(truth, Objects) else truth
    for title, content in (('Ground truth', truth), ('Prediction', sample.prediction)):
        if content is None:
            continue
        if isinstance(content, Objects):
            paint = object_panel(title, sample.image, content, sample.classes, sample.palette)
        else:
            paint = class_map_panel(title, sample.image, content, sample.classes, sample.palette)
        first.append(paint)
    first.append(legend_panel(sample, (picture.shape[0], picture.shape[1])))
    stages = [stage_panel(sample, stage) for stage in range(len(sample.shares))]
    per_row = max(4, len(first))
    return [first, *[stages[i : i + per_row] for i in range(0, len(stages), per_row)]]


def sheet_size(rows: Sequence[Sequence[Panel]]) -> tuple[int, int]:
    """Width and height in pixels of a sheet with these panels, which are all of one size."""
    height, width = rows[0][0].pixels.shape[:2]
    columns = max(len(row) for row in rows)
    return columns * (width + _GAP) + _GAP, len(rows) * (height + _TITLE) + _GAP


def draw_sheet(sample: Sample) -> np.ndarray:
    """Draw the sheet of one sample.

    Args:
        sample: what to show.

    Returns:
        (H, W, 3) uint8, RGB; see ``sheet_size``.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sheet_panels(sample)
    width, height = sheet_size(rows)
    dpi = 100
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi, facecolor='white')
    canvas = FigureCanvasAgg(figure)
    panel_height, panel_width = rows[0][0].pixels.shape[:2]
    for row, panels in enumerate(rows):
        for column, panel in enumerate(panels):
            left = _GAP + column * (panel_width + _GAP)
            top = row * (panel_height + _TITLE) + _TITLE
            axes = figure.add_axes(
                (
                    left / width,
                    1 - (top + panel_height) / height,
                    panel_width / width,
                    panel_height / height,
                )
            )
            _draw_panel(axes, panel, sample, (panel_width / 512) ** 0.5)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


def save_sheet(sample: Sample, out_dir: str | Path) -> Path:
    """Draw the sheet of one sample and save it as PNG.

    Args:
        sample: what to show.
        out_dir: folder for the picture, made if needed.

    Returns:
        The path of the picture.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / f'{sample.name}.png'
    Image.fromarray(draw_sheet(sample)).save(path)
    return path


def _draw_panel(axes: Any, panel: Panel, sample: Sample, scale: float) -> None:
    """Draw one panel into axes that have exactly its size in pixels."""
    from matplotlib.patches import Rectangle

    classes, palette = sample.classes, sample.palette
    height, width = panel.pixels.shape[:2]
    axes.set_axis_off()
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.imshow(panel.pixels, extent=(0, width, height, 0), interpolation='none', aspect='auto')
    axes.set_title(panel.title, fontsize=16 * scale, pad=6, color='black')
    for box in sorted(panel.boxes, key=lambda box: box.score or 0):
        x1, y1, x2, y2 = box.corners
        for edge, line in (((0, 0, 0), 4.0), (colour_of(box.label, classes, palette), 2.2)):
            axes.add_patch(
                Rectangle(
                    (x1, y1),
                    x2 - x1,
                    y2 - y1,
                    fill=False,
                    edgecolor=[value / 255 for value in edge],
                    linewidth=line,
                )
            )
    for box in sorted(panel.boxes, key=lambda box: box.score or 0):
        text = classes[box.label] if box.label < len(classes) else str(box.label)
        if box.score is not None:
            text += f' {box.score:.2f}'
        x1, y1, _, y2 = box.corners
        above = y1 >= 28 * scale
        fill = colour_of(box.label, classes, palette)
        _tag(axes, x1, y1 if above else y2, text, above, fill, scale)
    for x, y, text in panel.tags:
        axes.text(
            x,
            y,
            text,
            ha='center',
            va='center',
            fontsize=13 * scale,
            color='black',
            clip_on=True,
            bbox={'facecolor': 'white', 'edgecolor': 'none', 'alpha': 0.75, 'pad': 1.5},
        )
    step = min(34 * scale, height / (len(panel.legend) + 1))
    for number, (colour, text) in enumerate(panel.legend):
        y = (number + 0.8) * step
        if colour is not None:
            axes.add_patch(
                Rectangle(
                    (10, y - 0.35 * step),
                    1.2 * step,
                    0.7 * step,
                    facecolor=[value / 255 for value in colour],
                    edgecolor='black',
                    linewidth=0.8,
                )
            )
        axes.text(
            10 if colour is None else 20 + 1.2 * step,
            y,
            text,
            va='center',
            fontsize=min(15 * scale, 0.5 * step),
            color='black',
        )


def _tag(
    axes: Any,
    x: float,
    y: float,
    text: str,
    above: bool,
    colour: tuple[int, int, int],
    scale: float,
) -> None:
    """A box's label: on its upper edge, or on the lower one where there is no room above."""
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    axes.annotate(
        text,
        (max(x, 1), y),
        xytext=(1, 2 if above else -2),
        textcoords='offset points',
        ha='left',
        va='bottom' if above else 'top',
        fontsize=13 * scale,
        color='black' if luminance > 120 else 'white',
        annotation_clip=True,
        bbox={
            'facecolor': [value / 255 for value in colour],
            'edgecolor': 'black',
            'linewidth': 0.6,
            'pad': 1.2,
        },
    )
