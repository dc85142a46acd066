"""Sheets: their size, what is greyed, what is labelled, and where token borders lie."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from idlevit_mm.visualization.sheets import (
    COLOURS,
    IGNORED,
    Objects,
    Sheet,
    active_panel,
    active_shares,
    cell_index,
    draw_sheet,
    enlarge,
    paint_active,
    sheet_panels,
)

NAMES = ('zero', 'one', 'two')


def sheet_of(height, width, *found, classes=NAMES):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    padded = (-(-height // 32) * 32, -(-width // 32) * 32)
    active = [
        (f'Stage {stage}', generator.integers(0, 3, [side // stride for side in padded]) / 2)
        for stage, stride in enumerate((4, 8, 16, 32), 1)
    ]
    titles = ('Ground truth', 'Prediction', 'Another')
    return Sheet(
        image, classes, padded, (height, width), list(zip(titles, found, strict=False)), active
    )


def objects(*corners, scores=None, masks=None):
    return Objects(np.array(corners, float), np.arange(len(corners)), scores, masks)


def test_share_is_the_mean_over_a_stages_blocks():
    first = torch.tensor([[[True, False]], [[True, True]]])
    second = torch.tensor([[[True, True]], [[False, False]]])
    shares = active_shares([[first, second], [first]], index=0)
    assert [title for title, _ in shares] == ['Stage 1', 'Stage 2']
    assert [share.tolist() for _, share in shares] == [[[1.0, 0.5]], [[1.0, 0.0]]]
    assert active_shares([[first, second]], index=1)[0][1].tolist() == [[0.5, 0.5]]
    blocks = dict(active_shares([[first, second], [first]], index=1, per='block'))
    assert list(blocks) == ['Stage 1, block 1', 'Stage 1, block 2', 'Stage 2, block 1']
    assert blocks['Stage 1, block 2'].tolist() == [[0.0, 0.0]]


def test_display_pixels_find_their_tokens_behind_padding_and_resizing():
    # 97 pixels, padded to 128, 32 tokens of 4 pixels, shown at 4 times their size.
    cells = cell_index(display=388, content=97, tokens=32, stride=4)
    assert cells[[0, 15, 16, -1]].tolist() == [0, 0, 1, 24]
    # An image of 50 pixels that the network saw at twice that size.
    assert cell_index(display=50, content=100, tokens=16, stride=8)[[3, 4]].tolist() == [0, 1]
    # A map that rounds down at its end: its last tokens cover the rest.
    assert cell_index(display=97, content=97, tokens=24, stride=4)[-1] == 23


def test_active_in_clear_idle_greyed_grid_between():
    image = np.full((64, 64, 3), (200, 40, 40), np.uint8)
    index = np.arange(64) // 32
    painted = paint_active(image, np.array([[1.0, 0.0], [0.5, 1.0]]), index, index).astype(int)
    assert painted[10, 10].tolist() == [200, 40, 40]
    idle = painted[10, 50]
    assert np.ptp(idle) < 40  # nearly grey
    assert idle[0] < painted[50, 10][0] < 200
    assert (painted[10, 32] > painted[10, 33]).all()  # the border is lighter
    # Where cells are small, a grid would hide the picture.
    index = np.arange(64) // 2
    assert (paint_active(image, np.ones((32, 32)), index, index) == image).all()


def test_images_are_enlarged_by_a_whole_factor_or_made_smaller():
    image = np.random.default_rng(0).integers(0, 256, (97, 131), dtype=np.uint8)
    assert enlarge(image).shape == (388, 524)
    assert (enlarge(image)[::4, ::4] == image).all()
    assert enlarge(np.zeros((600, 700, 3), np.uint8)).shape == (600, 700, 3)
    assert enlarge(np.zeros((1500, 3000, 3), np.uint8)).shape == (512, 1024, 3)
    labels = np.full((2000, 1100), IGNORED, np.uint8)
    labels[:, :550] = 7
    assert set(np.unique(enlarge(labels))) == {7, IGNORED}  # labels are never mixed


@pytest.mark.parametrize(('height', 'width'), [(97, 131), (33, 200)])
def test_boxes_are_labelled_inside_their_panel(height, width):
    boxes = [(1.0, 2.0, 20.0, 30.0), (0.0, 0.0, width, height), (width - 4.0, 9.0, width, 20.0)]
    found = objects(*boxes, scores=np.array([0.5, 0.25, 1.0]))
    sheet = sheet_of(height, width, objects(*boxes), found, found)
    rows = sheet_panels(sheet)
    assert [panel.title for panel in rows[0]] == [
        f'Image: {width}×{height} pixels',
        'Ground truth',
        'Prediction',
        'Another',
    ]
    assert len(rows[1]) == 4
    panel = rows[0][2]
    shown_height, shown_width = panel.pixels.shape[:2]
    assert np.allclose(panel.boxes, np.array(boxes) * (shown_width / width))
    assert [text.text for text in panel.texts] == ['zero 0.50', 'one 0.25', 'two 1.00']
    assert [text.text for text in rows[0][1].texts] == ['zero', 'one', 'two']
    for text in panel.texts:
        assert 0 < text.x < shown_width - 60
        assert 0 < text.y < shown_height
    drawn = draw_sheet(sheet)
    assert drawn.shape[0] > 2 * shown_height
    assert drawn.shape[1] > 4 * shown_width
    column = drawn[: shown_height + 40, 2 * shown_width :]
    for i in range(3):
        assert (column == COLOURS[i]).all(-1).any()  # labels have the colours of their classes


def test_detector_without_masks_is_not_shown_true_ones():
    masks = np.zeros((1, 40, 40), bool)
    masks[:, 10:20] = True
    truth, plain = objects((0, 10, 40, 20), masks=masks), objects((0, 10, 40, 20))
    image = enlarge(sheet_of(40, 40).image)
    assert (sheet_panels(sheet_of(40, 40, truth, plain))[0][1].pixels == image).all()
    shown = sheet_panels(sheet_of(40, 40, truth, truth))[0][1].pixels
    changed = (shown != image).any(-1)
    assert changed[150:240].all()
    assert not changed[:120].any()


def test_class_maps_are_coloured_and_tagged():
    truth = np.zeros((97, 131), np.uint8)
    truth[:48, :65] = 2
    truth[-5:] = IGNORED
    sheet = sheet_of(97, 131, truth, classes=('background', 'one', 'two'))
    panel = sheet_panels(sheet)[0][1]
    assert [text.text for text in panel.texts] == ['two']
    assert panel.texts[0].x < 65 * 4
    pixels = panel.pixels.astype(float)
    assert np.ptp(pixels[200, 300]) == 0  # background and ignored pixels have no colour
    assert pixels[100, 100].argmin() == np.argmin(COLOURS[1])
    assert pixels[-10:].mean() < 0.6 * pixels[300:350].mean()
    assert draw_sheet(sheet).shape[2] == 3


def test_nothing_found_and_no_stage():
    sheet = replace(sheet_of(50, 50, objects(scores=np.zeros(0))._replace(boxes=np.zeros((0, 4)))))
    assert [panel.title for panel in sheet_panels(sheet)[0][1:]] == ['Ground truth']
    assert draw_sheet(sheet).shape[1] > 4 * 512
    assert draw_sheet(replace(sheet, found=[], active=[])).shape[1] < 2 * 512


def test_stage_title_tells_tokens_and_share():
    share = np.zeros((16, 20))
    share[:8] = 1
    panel = active_panel('Stage 2', sheet_of(97, 131), share)
    assert panel.title == 'Stage 2: 20×16 tokens, 50 % kept'


def test_colours_of_classes():
    digits = [str(i) for i in range(10)]
    assert [sheet_of(9, 9, classes=digits).colour(i) for i in range(10)] == list(COLOURS)
    sheet = sheet_of(9, 9, classes=['background', *digits])
    assert [sheet.colour(i) for i in range(11)] == [None, *COLOURS]
    # Many classes keep the colours of their data set, if it has one for each.
    palette = [[i, 255 - i, 7] for i in range(150)]
    many = replace(sheet_of(9, 9, classes=[f'class {i}' for i in range(150)]), palette=palette)
    assert [many.colour(i) for i in (3, 149)] == [(3, 252, 7), (149, 106, 7)]
    assert replace(many, palette=palette[:100]).colour(149) in COLOURS
    assert replace(many, classes=NAMES).colour(1) == COLOURS[1]
