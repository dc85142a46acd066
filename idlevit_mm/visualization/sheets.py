"""Pictures of what a model saw, found and left idle: one sheet per image.

A sheet shows the image, ground truth and predictions, and the tokens that were active in every
stage or block of the backbone. Images are enlarged without smoothing, so that a pixel of a
small image stays a visible square.
Shape letters: N instances, H and W of an image, Ht and Wt of a token map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from mmengine.visualization import Visualizer
from torch import Tensor

Colour = tuple[int, ...]
# Okabe and Ito's seven colours and three of Paul Tol's: distinct for colour-blind readers too.
COLOURS: tuple[Colour, ...] = (
    *((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (0, 114, 178)),
    *((213, 94, 0), (204, 121, 167), (136, 34, 85), (51, 34, 136), (221, 221, 221)),
)
IGNORED = 255
_MIN_SIDE, _MAX_SIDE = 512, 1024
_TITLE, _GAP = 44, 12
_LUMINANCE = np.array([0.299, 0.587, 0.114], np.float32)
# Idle tokens: little contrast around a bluish middle grey, which neither a dark nor a light part
# of a photograph looks like.
_IDLE_CONTRAST, _IDLE_TONE = 0.25, np.array([84, 90, 104], np.float32)
_MIN_CELL = 6
# Smallest region of a class map that is tagged, as a share of the image.
_TAGGED = 0.002
_CENTRED: dict[str, Any] = {'horizontal_alignments': 'center'}
_KEY = 'Tokens in colour were active, greyed ones idle, those between active in some of the blocks.'


class Objects(NamedTuple):
    """Instances of one image: corners (N, 4), labels (N,), scores (N,) and masks (N, H, W)."""

    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray | None = None
    masks: np.ndarray | None = None


# Instances, or a class map (H, W) with 255 for ignored pixels.
Content = Objects | np.ndarray


@dataclass
class Sheet:
    """What a sheet shows."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    classes: Sequence[str]
    input_size: tuple[int, int]  # of the network's input, padding included
    content_size: tuple[int, int]  # of the image within that input
    # Title and content of the panels beside the image: ground truth, predictions.
    found: Sequence[tuple[str, Content]] = ()
    # Name of a stage or block, and the share (Ht, Wt) of it in which a token was active.
    active: Sequence[tuple[str, np.ndarray]] = ()
    # (R, G, B) per class, used where there are more classes than ``COLOURS``.
    palette: Sequence[Sequence[int]] | None = None

    def class_name(self, label: int) -> str:
        """Name of a class, its number where it has none."""
        return self.classes[label] if label < len(self.classes) else str(label)

    def colour(self, label: int) -> Colour | None:
        """Colour of a class; None for the background."""
        if self.class_name(label).lower() == 'background':
            return None
        offset = int(self.class_name(0).lower() == 'background')
        if self.palette and len(self.classes) - offset > len(COLOURS) and label < len(self.palette):
            return tuple(map(int, self.palette[label]))
        return COLOURS[(label - offset) % len(COLOURS)]


class Text(NamedTuple):
    """A text in the pixels of its panel, and how ``Visualizer.draw_texts`` draws it."""

    text: str
    x: float
    y: float
    style: dict[str, Any]

    @classmethod
    def within(
        cls, width: int, text: str, x: float, y: float, points: float = 13, **style: Any
    ) -> Text:
        """A text that does not leave a panel ``width`` pixels wide; its letters grow with that."""
        size = min(points * (width / 512) ** 0.5, width / (0.84 * max(1, len(text))))
        length = 0.84 * size * len(text)
        style = {'colors': 'black', 'vertical_alignments': 'center', 'font_sizes': size} | style
        before = length / 2 if style.get('horizontal_alignments') == 'center' else 0.0
        return cls(text, max(3 + before, min(x, width - length + before)), y, style)


class Panel(NamedTuple):
    """A picture (H, W, 3) in display size, its title, and what is drawn over it, in its pixels."""

    title: str
    pixels: np.ndarray
    texts: Sequence[Text] = ()
    boxes: np.ndarray = np.zeros((0, 4))
    colours: Sequence[Colour] = ()


def active_shares(
    keep_masks: Sequence[Sequence[Tensor]], index: int = 0, per: Literal['stage', 'block'] = 'stage'
) -> list[tuple[str, np.ndarray]]:
    """Name and share (Ht, Wt) of the blocks of a stage, or of one block, that computed a token.

    ``keep_masks`` is a backbone's: stages, blocks, (B, Ht, Wt) bool; ``index`` tells the image.
    """
    shares = []
    for stage, blocks in enumerate(keep_masks, 1):
        maps = torch.stack([mask[index].float() for mask in blocks]).cpu().numpy()
        own = [('', maps.mean(0))] if per == 'stage' else enumerate(maps, 1)
        shares += [(f'Stage {stage}{i and f", block {i}"}', share) for i, share in own]
    return shares


def cell_index(display: int, content: int, tokens: int, stride: int) -> np.ndarray:
    """Token of each of ``display`` pixels along an axis; they show ``content`` pixels of the input.

    A token covers ``stride`` pixels of the input, which may be larger by its padding.
    """
    centres = (np.arange(display) + 0.5) * (content / display)
    return np.minimum((centres / stride).astype(int), tokens - 1)


def paint_active(
    image: np.ndarray, share: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Image (H, W, 3) in clear where tokens were active, greyed where not, with the token grid.

    ``share`` is (Ht, Wt) in [0, 1], ``rows`` (H,) and ``columns`` (W,) tell the tokens of pixels.
    """
    clear = image.astype(np.float32)
    idle = (clear @ _LUMINANCE)[..., None] * _IDLE_CONTRAST + _IDLE_TONE
    weight = share[rows][:, columns][..., None].astype(np.float32)
    painted = weight * clear + (1 - weight) * idle
    smallest = min(np.bincount(rows).max(), np.bincount(columns).max())
    if smallest >= _MIN_CELL:
        # One line width, lighter for small cells, so that the grid never hides the picture.
        strength = 0.35 if smallest >= 24 else 0.22
        lines = _borders(rows[:, None] * share.shape[1] + columns)
        painted[lines] = (1 - strength) * painted[lines] + strength * 255
    return painted.round().clip(0, 255).astype(np.uint8)


def enlarge(image: np.ndarray) -> np.ndarray:
    """Bring the longer side to at least 512 pixels by a whole factor, or down to 1024."""
    longer = max(image.shape[:2])
    if longer > _MAX_SIDE:
        height, width = (max(1, round(side * _MAX_SIDE / longer)) for side in image.shape[:2])
        # Labels are never mixed.
        mode = cv2.INTER_NEAREST if image.ndim == 2 else cv2.INTER_AREA
        return cv2.resize(image, (width, height), interpolation=mode)
    factor = -(-_MIN_SIDE // longer)
    return image.repeat(factor, axis=0).repeat(factor, axis=1)


def objects_panel(title: str, sheet: Sheet, objects: Objects) -> Panel:
    """Boxes with their labels, and masks if there are any, over the image."""
    pixels = enlarge(sheet.image).copy()
    height, width = pixels.shape[:2]
    boxes = objects.boxes * (width / sheet.image.shape[1])
    colours = [sheet.colour(int(label)) or COLOURS[-1] for label in objects.labels]
    room = 28 * (width / 512) ** 0.5
    texts = []
    for i, (colour, (x1, y1, _, y2)) in enumerate(zip(colours, boxes, strict=True)):
        if objects.masks is not None:
            inside = enlarge(objects.masks[i].astype(np.uint8)) > 0
            pixels[inside] = 0.45 * pixels[inside] + 0.55 * np.array(colour)
        text = sheet.class_name(int(objects.labels[i]))
        text += '' if objects.scores is None else f' {objects.scores[i]:.2f}'
        style: dict[str, Any] = {
            'colors': 'black' if np.dot(colour, _LUMINANCE) > 120 else 'white',
            'vertical_alignments': 'bottom' if y1 >= room else 'top',
            'bboxes': {'facecolor': np.divide(colour, 255), 'linewidth': 0.6, 'pad': 1.2},
        }
        # Above the box, else below it, else inside.
        y = y1 - 4 if y1 >= room else (y2 if y2 + room <= height else y1) + 4
        texts.append(Text.within(width, text, x1 + 3, y, **style))
    return Panel(title, pixels, texts, boxes, colours)


def class_map_panel(title: str, sheet: Sheet, class_map: np.ndarray) -> Panel:
    """Classes as colours over the greyed image, larger regions tagged with their names."""
    labels = enlarge(class_map.astype(np.uint8))
    painted = np.repeat((enlarge(sheet.image) @ _LUMINANCE)[..., None] * 0.6 + 50, 3, axis=-1)
    box: Any = {'facecolor': 'white', 'edgecolor': 'none', 'alpha': 0.75, 'pad': 1.5}
    texts = []
    for label in np.unique(labels[labels < len(sheet.classes)]):
        inside, colour, name = labels == label, sheet.colour(label), sheet.class_name(label)
        if colour is None:
            continue
        painted[inside] = 0.3 * painted[inside] + 0.7 * np.array(colour)
        _, regions, stats, _ = cv2.connectedComponentsWithStats(inside.astype(np.uint8))
        for region in 1 + np.flatnonzero(stats[1:, cv2.CC_STAT_AREA] >= _TAGGED * inside.size):
            # The name stands where the region is widest.
            distance = cv2.distanceTransform((regions == region).astype(np.uint8), cv2.DIST_L2, 3)
            y, x = map(int, np.unravel_index(distance.argmax(), distance.shape))
            y = max(16, min(y, len(labels) - 16))
            texts.append(Text.within(labels.shape[1], name, x, y, **_CENTRED, bboxes=box))
    painted[labels == IGNORED] *= 0.4
    painted[_borders(labels)] = 255  # keeps colours apart that are alike in lightness
    return Panel(title, painted.round().clip(0, 255).astype(np.uint8), texts)


def active_panel(name: str, sheet: Sheet, share: np.ndarray) -> Panel:
    """The active tokens of a stage or block over the image."""
    shown = enlarge(sheet.image)
    # The longer axis tells the stride best: rounding up a short map distorts the quotient.
    axis = int(sheet.input_size[1] > sheet.input_size[0])
    stride = 2 ** round(math.log2(sheet.input_size[axis] / share.shape[axis]))
    rows, columns = (
        cell_index(shown.shape[i], sheet.content_size[i], share.shape[i], stride) for i in (0, 1)
    )
    kept = f'{share.shape[1]}×{share.shape[0]} tokens, {100 * share.mean():.0f} % kept'
    return Panel(f'{name}: {kept}', paint_active(shown, share, rows, columns))


def sheet_panels(sheet: Sheet) -> list[list[Panel]]:
    """The rows of a sheet: the image and what was found, then active tokens."""
    height, width = sheet.image.shape[:2]
    first = [Panel(f'Image: {width}×{height} pixels', enlarge(sheet.image))]
    # A detector without masks is not compared with masks.
    plain = any(isinstance(found, Objects) and found.masks is None for _, found in sheet.found)
    for title, found in sheet.found:
        if isinstance(found, Objects):
            objects = found._replace(masks=None) if plain else found
            first.append(objects_panel(title, sheet, objects))
        else:
            first.append(class_map_panel(title, sheet, found))
    panels = [active_panel(name, sheet, share) for name, share in sheet.active]
    per_row = max(4, len(first))
    return [first, *(panels[i : i + per_row] for i in range(0, len(panels), per_row))]


def draw_sheet(sheet: Sheet) -> np.ndarray:
    """Draw a sheet: (H, W, 3) uint8, RGB."""
    rows = sheet_panels(sheet)
    height, width = rows[0][0].pixels.shape[:2]
    pitch = np.array([width + _GAP, height + _TITLE])
    columns = max(map(len, rows))
    canvas = np.full((len(rows) * pitch[1] + _TITLE, columns * pitch[0] + _GAP, 3), 255, np.uint8)
    points = 16 * (width / canvas.shape[1]) ** 0.5
    key = Text.within(canvas.shape[1], _KEY, _GAP, canvas.shape[0] - 0.5 * _TITLE, points)
    placed: list[Any] = [(Panel('', canvas), np.zeros(2), [key] if sheet.active else [])]
    for row, panels in enumerate(rows):
        for column, panel in enumerate(panels):
            left, top = corner = (column, row) * pitch + (_GAP, _TITLE)
            canvas[top : top + height, left : left + width] = panel.pixels
            title = Text.within(width, panel.title, width / 2, -0.45 * _TITLE, 16, **_CENTRED)
            placed.append((panel, corner, [title, *panel.texts]))
    visualizer = Visualizer(image=canvas)
    for panel, corner, texts in placed:
        if len(panel.boxes):
            boxes = panel.boxes + np.tile(corner, 2)
            visualizer.draw_bboxes(boxes, 'black', line_widths=4.0, alpha=1.0)
            visualizer.draw_bboxes(boxes, panel.colours, line_widths=2.2, alpha=1.0)
        for text, x, y, style in texts:
            visualizer.draw_texts(text, corner + (x, y), **style)
    return visualizer.get_image()


def _borders(regions: np.ndarray) -> np.ndarray:
    """Pixels (H, W) whose number differs from that above or to the left."""
    edges = np.zeros(regions.shape, bool)
    edges[1:] |= regions[1:] != regions[:-1]
    edges[:, 1:] |= regions[:, 1:] != regions[:, :-1]
    return edges
