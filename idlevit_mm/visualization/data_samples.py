"""What a sheet takes from a data sample of mmdet or mmseg: prediction, ground truth, sizes."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from .sheets import Box, Objects


def prediction_of(data_sample: Any, score_thr: float) -> Objects | np.ndarray | None:
    """Prediction in the pixels of the original image.

    Args:
        data_sample: what a detector or a segmentor returned for one image.
        score_thr: instances with a lower score are left out.

    Returns:
        Instances, or a class map (H, W); None if the sample has neither.
    """
    if 'pred_instances' in data_sample:
        instances = data_sample.pred_instances
        return _objects_of(instances[instances.scores >= score_thr])
    if 'pred_sem_seg' in data_sample:
        return data_sample.pred_sem_seg.data[0].cpu().numpy()
    return None


def truth_of(data_sample: Any, size: tuple[int, int]) -> Objects | np.ndarray | None:
    """Ground truth that the pipeline loaded.

    Args:
        data_sample: what the pipeline packed for one image.
        size: height and width of the picture; maps and masks of another size are resized to it.

    Returns:
        Instances, or a class map (H, W); None if the sample has neither.
    """
    if 'gt_instances' in data_sample:
        return _objects_of(data_sample.gt_instances, size)
    if 'gt_sem_seg' in data_sample:
        return _resized(data_sample.gt_sem_seg.data[0].cpu().numpy(), size)
    return None


def content_size(data_sample: Any) -> tuple[int, int]:
    """Height and width that the image covers within the network's input.

    The padding of the data preprocessor is never part of ``img_shape``. That of a ``Pad`` in the
    pipeline is, so the original size and the factor of the resizing tell, where they are known.
    """
    height, width = data_sample.img_shape[:2]
    original, factors = data_sample.get('ori_shape'), data_sample.get('scale_factor')
    if original is None or factors is None:
        return height, width
    return (
        min(height, max(1, round(original[0] * factors[1]))),
        min(width, max(1, round(original[1] * factors[0]))),
    )


def _objects_of(instances: Any, size: tuple[int, int] | None = None) -> Objects:
    """Boxes, scores if any, and masks if any, brought to a size."""
    instances = instances.cpu()
    corners = getattr(instances.bboxes, 'tensor', instances.bboxes).tolist()
    labels = instances.labels.tolist()
    scores = instances.scores.tolist() if 'scores' in instances else [None] * len(labels)
    boxes = tuple(
        Box(tuple(box), label, score)
        for box, label, score in zip(corners, labels, scores, strict=True)
    )
    if 'masks' not in instances:
        return Objects(boxes)
    masks = instances.masks
    masks = masks.to_ndarray() if hasattr(masks, 'to_ndarray') else np.asarray(masks)
    masks = masks.astype(bool)
    if size is not None and len(masks) and masks.shape[1:] != size:
        masks = np.stack([_resized(mask, size) for mask in masks])
    return Objects(boxes, masks)


def _resized(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (H, W) of labels at another size; labels are never mixed."""
    if labels.shape == size:
        return labels
    picture = Image.fromarray(labels.astype(np.uint8))
    resized = np.asarray(picture.resize(size[::-1], Image.Resampling.NEAREST))
    return resized.astype(labels.dtype)
