"""What a sheet takes from a data sample of mmdet or mmseg: prediction, ground truth, sizes."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from .sheets import Content, Objects


def picture_of(pixels: np.ndarray) -> np.ndarray:
    """The picture (H, W, 3), RGB, of an image as a pipeline packs it: (C, H, W), blue first.

    With less than three channels the first is shown grey, and of more than three the first three.
    """
    shown = pixels[2::-1] if len(pixels) > 2 else pixels[[0, 0, 0]]
    return np.ascontiguousarray(shown.transpose(1, 2, 0).round().clip(0, 255).astype(np.uint8))


def prediction_of(data_sample: Any, score_thr: float) -> Content | None:
    """Prediction in the pixels of the original image: instances from a score on, or a class map.

    None if the sample, which a detector or a segmentor returned, has neither.
    """
    if 'pred_instances' in data_sample:
        instances = data_sample.pred_instances
        return _objects_of(instances[instances.scores >= score_thr])
    if 'pred_sem_seg' in data_sample:
        return data_sample.pred_sem_seg.data[0].cpu().numpy()
    return None


def truth_of(data_sample: Any, size: tuple[int, int]) -> Content | None:
    """Ground truth that the pipeline loaded: instances or a class map, None if there is neither.

    Maps and masks of another ``size`` (H, W) than that of the picture are resized to it.
    """
    # mmdet packs instances without boxes where the pipeline loads none.
    if 'bboxes' in data_sample.get('gt_instances', ()):
        objects = _objects_of(data_sample.gt_instances)
        if objects.masks is None or not len(objects.masks):
            return objects
        return objects._replace(masks=np.stack([_resized(mask, size) for mask in objects.masks]))
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


def _objects_of(instances: Any) -> Objects:
    """Boxes, labels, and scores and masks where there are any."""
    boxes = getattr(instances.bboxes, 'tensor', instances.bboxes).cpu().numpy()
    scores = instances.scores.cpu().numpy() if 'scores' in instances else None
    masks = instances.get('masks')
    if masks is not None:
        masks = masks.to_ndarray() if hasattr(masks, 'to_ndarray') else masks.cpu().numpy()
        masks = masks.astype(bool)
    return Objects(boxes, instances.labels.cpu().numpy(), scores, masks)


def _resized(labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map (H, W) of labels at another size; labels are never mixed."""
    way = cv2.INTER_NEAREST_EXACT
    return cv2.resize(labels.astype(np.uint8), size[::-1], interpolation=way).astype(labels.dtype)
