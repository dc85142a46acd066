"""Sheets of trained models: several predictions beside each other, images without ground truth."""

import copy

import numpy as np
import pytest
import torch
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, MODELS, DefaultScope
from PIL import Image

pytest.importorskip('mmdet')


@pytest.fixture
def pictures(tool):
    return tool('draw_active_tokens')


@pytest.fixture
def models(scene_config):
    """A detector with all tokens active and the same with a part of them."""
    cfg = scene_config('retinanet_idle-swin_digits')
    with DefaultScope.overwrite_default_scope('mmdet'):
        idle = MODELS.build(cfg.model).eval()
        idle.cfg = cfg
        dense = copy.deepcopy(idle)
        dense.backbone.set_keep_ratios(1.0)
        yield {'Dense': dense, 'Idle': idle}


def test_predictions_beside_each_other(pictures, models, tmp_path):
    data = DATASETS.build(models['Idle'].cfg.test_dataloader.dataset)[1]
    sheet = pictures.sheet_of(models, data, score_threshold=0.0, per='block')
    assert [title for title, _ in sheet.found] == ['Ground truth', 'Dense', 'Idle']
    assert len(sheet.found[0][1].boxes) > 0
    for (_, found), model in zip(sheet.found[1:], models.values(), strict=True):
        with torch.no_grad():
            (result,) = model.test_step(pseudo_collate([data]))
        assert np.array_equal(found.boxes, result.pred_instances.bboxes)
    # Active tokens are those of the last model.
    assert len(sheet.active) == sum(models['Idle'].backbone.depths)
    assert all(0 < share.mean() < 1 for _, share in sheet.active)

    paths = pictures.draw(models, tmp_path / 'new', count=2)
    assert paths == [tmp_path / 'new' / f'{name}.png' for name in ('000000', '000002')]
    with Image.open(paths[0]) as picture:
        assert picture.width > 4 * 512


def test_image_files_have_no_ground_truth(pictures, models, tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(pictures, 'draw_sheet', lambda sheet: sheets.append(sheet) or sheet.image)
    image = tmp_path / 'image.png'
    Image.fromarray(np.full((40, 60, 3), (250, 20, 90), np.uint8)).save(image)
    (path,) = pictures.draw({'Found': models['Idle']}, tmp_path / 'new', [image])
    assert path.name == '000_image.png'
    with Image.open(path) as picture:
        assert np.array_equal(np.asarray(picture), np.asarray(Image.open(image)))
    assert [title for title, _ in sheets[0].found] == ['Found']
    assert sheets[0].content_size == (40, 60)
    with pytest.raises(FileNotFoundError, match=r"images=\['none.jpg'\] are not files"):
        pictures.draw(models, tmp_path, ['none.jpg'])


def test_an_animation_shows_blocks_of_two_idle_models(pictures, models, tmp_path, monkeypatch):
    sheets = []
    monkeypatch.setattr(
        pictures, 'draw_sheet', lambda sheet: sheets.append(sheet) or sheet.image + len(sheets)
    )
    models['Dense'].backbone.set_keep_ratios(0.5)
    (path,) = pictures.draw(models, tmp_path, count=1, gif=True)
    depths = models['Idle'].backbone.depths
    assert path.name == '000000.gif'
    assert len(sheets) == sum(depths)
    assert [name for name, _ in sheets[-1].active] == [
        f'{title}, stage {len(depths)}, block {depths[-1]}' for title in models
    ]
    # Each shows what its own model kept.
    assert all(a.mean() < b.mean() for (_, a), (_, b) in (sheet.active for sheet in sheets))
    with Image.open(path) as animation:
        assert animation.n_frames == len(sheets)
