"""Sheets: their size, what is greyed, and where token borders lie, for odd image shapes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from idlevit_mm.visualization.sheets import (
    COLOURS,
    IGNORED,
    Box,
    Objects,
    Sample,
    cell_index,
    colour_of,
    draw_sheet,
    enlarge,
    legend_panel,
    paint_active,
    save_sheet,
    sheet_panels,
    sheet_size,
    stage_panel,
    stage_shares,
)

NAMES = ('zero', 'one', 'two')


def _sample(height, width, truth=None, prediction=None, classes=NAMES):
    generator = np.random.default_rng(0)
    image = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
    padded = (-(-height // 32) * 32, -(-width // 32) * 32)
    shares = [
        generator.integers(0, 3, (padded[0] // stride, padded[1] // stride)) / 2
        for stride in (4, 8, 16, 32)
    ]
    return Sample('scene', image, classes, shares, padded, (height, width), truth, prediction)


def _boxes(*corners):
    return Objects(tuple(Box(corner, i, 0.5) for i, corner in enumerate(corners)))


def test_share_is_the_mean_over_a_stages_blocks():
    first = torch.tensor([[[True, False]], [[True, True]]])
    second = torch.tensor([[[True, True]], [[False, False]]])
    shares = stage_shares([[first, second], [first]], index=0)
    assert [share.tolist() for share in shares] == [[[1.0, 0.5]], [[1.0, 0.0]]]
    assert stage_shares([[first, second]], index=1)[0].tolist() == [[0.5, 0.5]]


def test_display_pixels_find_their_tokens_behind_padding_and_resizing():
    # 97 pixels, padded to 128, 32 tokens of 4 pixels, shown at 4 times their size.
    cells = cell_index(display=388, content=97, padded=128, tokens=32)
    assert cells[0] == 0
    assert cells[15] == 0
    assert cells[16] == 1
    assert cells[-1] == 24  # pixel 96
    # An image of 50 pixels that the network saw at twice that size.
    cells = cell_index(display=50, content=100, padded=128, tokens=16)
    assert cells[3] == 0
    assert cells[4] == 1
    # A map that rounds down at its end: its last tokens cover the rest.
    assert cell_index(display=97, content=97, padded=97, tokens=24, stride=4)[-1] == 23


def test_active_in_clear_idle_greyed_grid_between():
    image = np.full((64, 64, 3), (200, 40, 40), np.uint8)
    index = np.arange(64) // 32
    share = np.array([[1.0, 0.0], [0.5, 1.0]])
    painted = paint_active(image, share, index, index).astype(int)
    assert painted[10, 10].tolist() == [200, 40, 40]
    idle = painted[10, 50]
    assert np.ptp(idle) < 40  # nearly grey
    half = painted[50, 10]
    assert idle[0] < half[0] < 200
    assert (painted[10, 32] > painted[10, 33]).all()  # the border is lighter


def test_grid_is_left_out_where_it_would_hide_the_picture():
    image = np.full((64, 64, 3), 100, np.uint8)
    index = np.arange(64) // 2
    assert (paint_active(image, np.ones((32, 32)), index, index) == 100).all()


@pytest.mark.parametrize(
    ('shape', 'expected'),
    [((128, 128), (512, 512)), ((97, 131), (388, 524)), ((600, 700), (600, 700))],
)
def test_enlarged_by_a_whole_factor(shape, expected):
    image = np.arange(shape[0] * shape[1], dtype=np.uint32).astype(np.uint8).reshape(shape)
    shown = enlarge(image)
    assert shown.shape == expected
    factor = expected[0] // shape[0]
    assert (shown[::factor, ::factor] == image).all()


def test_large_images_are_made_smaller():
    assert enlarge(np.zeros((1500, 3000, 3), np.uint8)).shape == (512, 1024, 3)
    labels = np.full((2000, 1100), IGNORED, np.uint8)
    labels[:, :550] = 7
    assert set(np.unique(enlarge(labels))) == {7, IGNORED}  # labels are never mixed


@pytest.mark.parametrize(('height', 'width'), [(128, 128), (97, 131), (33, 200)])
def test_detection_sheet(tmp_path, height, width):
    boxes = _boxes((1.0, 2.0, 20.0, 30.0), (0.0, 0.0, float(width), float(height)))
    sample = _sample(height, width, boxes, boxes)
    path = save_sheet(sample, tmp_path / 'new')
    rows = sheet_panels(sample)
    assert [len(row) for row in rows] == [4, 4]
    with Image.open(path) as picture:
        assert picture.size == sheet_size(rows)
        assert picture.size[0] >= 4 * 512
    panel = rows[0][2]
    scale = panel.pixels.shape[1] / width
    assert panel.boxes[0].corners == (scale, 2 * scale, 20 * scale, 30 * scale)


def test_detector_without_masks_is_not_shown_true_ones():
    masks = np.zeros((1, 40, 40), bool)
    masks[:, 10:20] = True
    truth = Objects((Box((0, 10, 40, 20), 0),), masks)
    plain = Objects((Box((0, 10, 40, 20), 0, 0.9),))
    with_masks = Objects(plain.boxes, masks)
    image = enlarge(_sample(40, 40).image)
    hidden = sheet_panels(_sample(40, 40, truth, plain))[0][1].pixels
    shown = sheet_panels(_sample(40, 40, truth, with_masks))[0][1].pixels
    assert (hidden == image).all()
    assert not (shown == image).all()


@pytest.mark.parametrize(('height', 'width'), [(64, 64), (97, 131)])
def test_segmentation_sheet(tmp_path, height, width):
    truth = np.zeros((height, width), np.uint8)
    truth[: height // 2, : width // 2] = 2
    truth[-5:] = IGNORED
    sample = _sample(height, width, truth, np.zeros_like(truth), ('background', 'one', 'two'))
    path = save_sheet(sample, tmp_path)
    with Image.open(path) as picture:
        assert picture.size == sheet_size(sheet_panels(sample))
    panel = sheet_panels(sample)[0][1]
    assert [tag[2] for tag in panel.tags] == ['two']
    legend = [text for colour, text in legend_panel(sample, (512, 512)).legend if colour]
    assert legend == ['background', 'two']


def test_sheet_without_ground_truth(tmp_path):
    sample = _sample(50, 50, None, _boxes((1, 1, 9, 9)))
    assert [panel.title for panel in sheet_panels(sample)[0][1:]] == ['Prediction', '']
    assert save_sheet(sample, tmp_path).is_file()


def test_stage_title_tells_tokens_and_share():
    sample = _sample(97, 131)
    sample.shares[1] = np.zeros((16, 20))
    sample.shares[1][:8] = 1
    assert stage_panel(sample, 1).title == 'Stage 2: 20×16 tokens, 50 % kept'


def test_every_digit_has_its_own_colour():
    digits = [str(i) for i in range(10)]
    assert len({colour_of(i, digits) for i in range(10)}) == 10
    with_background = ['background', *digits]
    assert [colour_of(i + 1, with_background) for i in range(10)] == list(COLOURS)


def test_many_classes_keep_the_colours_of_their_data_set(tmp_path):
    many = [f'class {i}' for i in range(150)]
    palette = [[i, 255 - i, 7] for i in range(150)]
    assert len({colour_of(i, many, palette) for i in range(150)}) == 150
    assert colour_of(3, many, palette) == (3, 252, 7)
    assert colour_of(1, NAMES, palette) == COLOURS[1]  # few keep those that are told apart best
    assert colour_of(149, many, palette[:100]) in COLOURS  # a palette that is too short

    labels = np.full((40, 40), 149, np.uint8)
    sample = replace(_sample(40, 40, labels, labels, many), palette=palette)
    assert legend_panel(sample, (512, 512)).legend[-1] == ((149, 106, 7), 'class 149')
    painted = sheet_panels(sample)[0][2].pixels
    assert painted.mean((0, 1)).argmin() == 2
    drawn = draw_sheet(sample)
    with Image.open(save_sheet(sample, tmp_path)) as picture:
        assert np.array_equal(np.asarray(picture), drawn)
    boxes = replace(_sample(40, 40, None, _boxes((1, 1, 9, 9)), many), palette=palette)
    assert not np.array_equal(draw_sheet(boxes), draw_sheet(replace(boxes, palette=None)))
