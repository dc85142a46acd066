"""Sheets of images of a data set, or of image files, from one or several trained models."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import mmcv
import numpy as np
import torch
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import DATASETS, TRANSFORMS
from torch import nn

from idlevit_mm.analysis.models import idle_backbone
from idlevit_mm.visualization.data_samples import content_size, prediction_of, truth_of
from idlevit_mm.visualization.sheets import Sheet, active_shares, draw_sheet

# Title of its prediction and model, a detector or segmentor from `models.load_model`. The last one
# has an idle backbone, whose active tokens are drawn; its config names data set and pipeline.
Models = Mapping[str, nn.Module]


def draw_dataset(
    models: Models,
    out_dir: str | Path,
    indices: Iterable[int] | None = None,
    count: int = 4,
    **options: Any,
) -> list[Path]:
    """Draw sheets for images of the test data set; returns the paths of the pictures.

    ``indices`` tells which images; when None, ``count`` are spread evenly over the data set.
    ``options`` are those of ``sheet_of``.

    Raises:
        ValueError: an index lies outside the data set.
    """
    dataset = DATASETS.build(list(models.values())[-1].cfg.test_dataloader.dataset)
    if indices is None:
        indices = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round()
    indices = [int(index) for index in indices]
    for index in indices:
        if not 0 <= index < len(dataset):
            raise ValueError(f'image index {index} must lie in [0, {len(dataset)})')
    return [_draw(models, dataset[index], out_dir, **options) for index in indices]


def draw_files(
    models: Models, images: Sequence[str | Path], out_dir: str | Path, **options: Any
) -> list[Path]:
    """Draw sheets for image files, as ``draw_dataset`` does, without ground truth.

    Raises:
        FileNotFoundError: one of the files does not exist.
    """
    missing = [str(path) for path in images if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(f'images={missing} are not files')
    steps = list(models.values())[-1].cfg.test_dataloader.dataset.pipeline
    pipeline = Compose(
        [TRANSFORMS.build(step) for step in steps if 'LoadAnnotations' not in str(step['type'])]
    )
    items = [
        pipeline({'img_path': str(path), 'img_id': number, 'seg_fields': []})
        for number, path in enumerate(images)
    ]
    return [_draw(models, item, out_dir, f'{i:03d}_', **options) for i, item in enumerate(items)]


def sheet_of(
    models: Models,
    data: dict[str, Any],
    score_threshold: float = 0.3,
    per: Literal['stage', 'block'] = 'stage',
) -> Sheet:
    """Run the models on one item of a data set and collect what a sheet shows.

    ``data`` is what the pipeline returned; its ground truth is shown if it loads it. Boxes with a
    lower score are left out. There is a panel of active tokens for each stage or each block.
    """
    found = []
    for title, model in models.items():
        with torch.no_grad():
            batch = model.data_preprocessor(pseudo_collate([data]), False)
            result = model(**batch, mode='predict')[0]
        found.append((title, prediction_of(result, score_threshold)))
    image = mmcv.imread(result.img_path, channel_order='rgb')
    truth = truth_of(data['data_samples'], image.shape[:2])
    if not getattr(model, 'dataset_meta', None):
        # Class names and colours, for which the data set needs no data on disk.
        cfg = dict(model.cfg.test_dataloader.dataset, lazy_init=True)
        model.dataset_meta = DATASETS.build(cfg).metainfo
    shown: list[Any] = [('Ground truth', truth), *found]
    return Sheet(
        image=image,
        classes=model.dataset_meta['classes'],
        input_size=tuple(batch['inputs'].shape[-2:]),
        content_size=content_size(result),
        found=[pair for pair in shown if pair[1] is not None],
        active=active_shares(idle_backbone(model).keep_masks, per=per),
        palette=model.dataset_meta.get('palette'),
    )


def _draw(
    models: Models, data: dict[str, Any], out_dir: str | Path, prefix: str = '', **options: Any
) -> Path:
    path = Path(out_dir) / f'{prefix}{Path(data["data_samples"].img_path).stem}.png'
    mmcv.imwrite(draw_sheet(sheet_of(models, data, **options))[..., ::-1], str(path))
    return path
