"""Sheets of images of a data set, or of image files, from a trained model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from idlevit_mm.visualization.data_samples import content_size, prediction_of
from idlevit_mm.visualization.sheets import (
    IGNORED,
    Box,
    Objects,
    Sample,
    save_sheet,
    stage_shares,
)


def draw_dataset(
    model: nn.Module,
    out_dir: str | Path,
    indices: Iterable[int] | None = None,
    count: int = 4,
    score_threshold: float = 0.3,
) -> list[Path]:
    """Draw sheets for images of the model's test data set, with their ground truth.

    Args:
        model: a detector or segmentor with an idle backbone, from ``models.load_model``.
        out_dir: folder for the pictures.
        indices: which images; evenly spread over the data set when None.
        count: how many, when ``indices`` is None.
        score_threshold: boxes with a lower score are left out.

    Returns:
        The paths of the pictures.

    Raises:
        ValueError: an index lies outside the data set.
    """
    from mmengine.registry import DATASETS

    dataset = DATASETS.build(model.cfg.test_dataloader.dataset)
    if indices is None:
        indices = np.linspace(0, len(dataset) - 1, min(count, len(dataset))).round().astype(int)
    paths = []
    for index in (int(i) for i in indices):
        if not 0 <= index < len(dataset):
            raise ValueError(f'image index {index} must lie in [0, {len(dataset)})')
        sample = sample_of(model, dataset[index], score_threshold)
        sample.truth = _truth_of(dataset, index, sample.image.shape[:2])
        paths.append(save_sheet(sample, out_dir))
    return paths


def draw_files(
    model: nn.Module,
    images: Sequence[str | Path],
    out_dir: str | Path,
    score_threshold: float = 0.3,
) -> list[Path]:
    """Draw sheets for image files, without ground truth.

    Args:
        model: a detector or segmentor with an idle backbone, from ``models.load_model``.
        images: the files.
        out_dir: folder for the pictures.
        score_threshold: boxes with a lower score are left out.

    Returns:
        The paths of the pictures.

    Raises:
        FileNotFoundError: one of the files does not exist.
    """
    from mmengine.dataset import Compose
    from mmengine.registry import TRANSFORMS

    missing = [str(path) for path in images if not Path(path).is_file()]
    if missing:
        raise FileNotFoundError(f'images={missing} are not files')
    steps = model.cfg.test_dataloader.dataset.pipeline
    pipeline = Compose(
        [TRANSFORMS.build(step) for step in steps if 'LoadAnnotations' not in str(step['type'])]
    )
    paths = []
    for number, path in enumerate(images):
        data = pipeline({'img_path': str(path), 'img_id': number, 'seg_fields': []})
        sample = sample_of(model, data, score_threshold)
        sample.name = f'{number:03d}_{Path(path).stem}'
        paths.append(save_sheet(sample, out_dir))
    return paths


def sample_of(model: nn.Module, data: dict[str, Any], score_threshold: float = 0.3) -> Sample:
    """Run the model on one item of a data set and collect what a sheet shows, but the truth."""
    import mmcv
    from mmengine.dataset import pseudo_collate

    from idlevit_mm.analysis.models import idle_backbone

    backbone = idle_backbone(model)
    with torch.no_grad():
        batch = model.data_preprocessor(pseudo_collate([data]), False)
        input_size = tuple(batch['inputs'].shape[-2:])
        result = model(**batch, mode='predict')[0]
    image = mmcv.imread(result.img_path, channel_order='rgb')
    meta = _dataset_meta(model)
    return Sample(
        name=Path(result.img_path).stem,
        image=image,
        classes=meta['classes'],
        shares=stage_shares(backbone.keep_masks),
        input_size=input_size,
        content_size=content_size(result),
        prediction=prediction_of(result, score_threshold),
        palette=meta.get('palette'),
    )


def _dataset_meta(model: nn.Module) -> dict[str, Any]:
    """Class names and colours of the test data set, which needs no data on disk for them."""
    from mmengine.registry import DATASETS

    if not getattr(model, 'dataset_meta', None):
        cfg = dict(model.cfg.test_dataloader.dataset, lazy_init=True)
        model.dataset_meta = DATASETS.build(cfg).metainfo
    return model.dataset_meta


def _truth_of(dataset: Any, index: int, size: tuple[int, int]) -> Objects | np.ndarray | None:
    """Ground truth of one image in the image's own pixels."""
    info = dataset.get_data_info(index)
    if info.get('seg_map_path') and 'instances' not in info:
        return _truth_map(info['seg_map_path'], dataset)
    if 'instances' not in info:
        return None
    instances = [item for item in info['instances'] if not item.get('ignore_flag')]
    boxes = tuple(Box(tuple(item['bbox']), int(item['bbox_label'])) for item in instances)
    masks = None
    if instances and all(item.get('mask') for item in instances):
        masks = np.stack([_decoded(item['mask'], size) for item in instances])
    return Objects(boxes, masks)


def _truth_map(path: str, dataset: Any) -> np.ndarray:
    """A class map from a PNG, with label 0 ignored where the data set says so."""
    labels = np.asarray(Image.open(path)).astype(np.int64)
    if getattr(dataset, 'reduce_zero_label', False):
        labels = np.where((labels == 0) | (labels == IGNORED), IGNORED, labels - 1)
    return labels.astype(np.uint8)


def _decoded(mask: Any, size: tuple[int, int]) -> np.ndarray:
    """A mask (H, W) from polygons or a run-length code."""
    from pycocotools import mask as coco_mask

    height, width = size
    if isinstance(mask, list):
        return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(mask, height, width))).astype(
            bool
        )
    if isinstance(mask['counts'], list):
        mask = coco_mask.frPyObjects(mask, height, width)
    return coco_mask.decode(mask).astype(bool)
