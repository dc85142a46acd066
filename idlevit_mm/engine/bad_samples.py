"""What happens when an image, its annotations, or a whole data set cannot be used.

In training, an image that cannot be read or does not fit its mask is left out with a warning that
names it, and another one takes its place, as mmengine does when a pipeline gives None. One broken
file must not end a run of days; but a data set that is broken as a whole must not be trained on
either, so too many of them are an error. In validation and testing every one is an error, since
scores over fewer images would be wrong.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any
from unittest import mock

import torch
from mmengine.dataset import Compose
from mmengine.logging import print_log
from PIL import Image

from ..errors import BadSampleError, one_line, reason, shortened
from .data_checks import mask_problem
from .data_sets import classes_of, leaves, warn

# Up to this many different files may be unusable, and beyond it this share of what was read.
MAX_BAD = 10
MAX_BAD_SHARE = 0.01
# Pixels of an image; 0.8 GB where they are bytes, and many times that on the way to the model.
MAX_PIXELS = 2**28
# Another image is drawn at random: where so many in turn are unusable, none is usable.
MAX_IN_A_ROW = 50


def _reading_problem(path: str, error: BaseException) -> str:
    if isinstance(error, FileNotFoundError):
        return f'{path} does not exist'
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return f'{path} is empty'
    reason = one_line(error, 200)
    if 'failed to load image' in reason:  # what mmcv says when OpenCV gives no image
        reason = 'not an image, or cut off'
    return f'{path} cannot be read ({reason})'


def _thin_mask(data: dict[str, Any]) -> str | None:
    """Whether mmseg, which drops axes of length 1, cannot load the mask of a thin image."""
    if data.get('seg_map_path') is None or 1 not in tuple(data.get('ori_shape', ())[:2]):
        return None
    return f'{data["seg_map_path"]} is one pixel high or wide, which mmseg cannot load'


def _size_of(data: dict[str, Any]) -> tuple[int, int]:
    """Width and height of an image as annotated, or by the head of its file; zeros if unknown."""
    if type(width := data.get('width')) is type(height := data.get('height')) is int:
        return width, height
    try:
        # Pillow refuses to look at what would be large when it is decoded.
        with mock.patch.object(Image, 'MAX_IMAGE_PIXELS', None):
            return Image.open(str(data.get('img_path'))).size
    except Exception:  # whoever loads it says why
        return 0, 0


class GuardedPipeline(Compose):
    """A pipeline that leaves unusable images out of training, and refuses them elsewhere.

    Args:
        transforms: The transforms of the pipeline that it replaces.
        training: Whether they are left out, with a warning each.
        num_classes: Number of classes that label maps may number, None if unknown.
        ignored: Labels beyond them that are ignored.
        ann_file: Where the annotations are from.
        max_pixels: Images that have more cannot be used.
    """

    def __init__(
        self,
        transforms: Sequence[Callable],
        training: bool,
        num_classes: int | None,
        ignored: Collection[int] = (255,),
        ann_file: str = '',
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        super().__init__(None)
        self.ann_file, self.max_pixels = ann_file, max_pixels
        self.transforms = list(transforms)
        self.training, self.num_classes, self.ignored = training, num_classes, ignored
        self.num_read = self.in_a_row = 0
        self.bad: set[str] = set()
        # Boxes are scaled by the size that was found, so only masks must have that of the file.
        masks = ('with_mask', 'with_seg')
        self.loads_masks = any(getattr(t, name, False) for t in self.transforms for name in masks)
        self.told_of_size = False

    def __call__(self, data: dict) -> dict | None:
        """Load and transform one image; None if it is left out, so that another one is taken.

        Raises:
            BadSampleError: It cannot be used in validation or testing, or too many cannot be.
        """
        self.num_read += 1
        name = str(data.get('img_path'))
        width, height = _size_of(data)
        if width * height > self.max_pixels:
            self._leave_out(
                f'{name} is {width}x{height}, more than env_cfg.max_pixels={self.max_pixels}: make '
                'it smaller, cut it into tiles, or allow it with --cfg-options env_cfg.max_pixels='
                f'{width * height}'
            )
            return None
        for transform in self.transforms:
            kind = type(transform).__name__
            loads = kind.startswith('Load')
            try:
                result = transform(data)
            except Exception as error:
                if isinstance(error, MemoryError) or 'nsufficient memory' in str(error):
                    raise BadSampleError(
                        f'{name} ({width}x{height}) does not fit into memory in {kind}: make it '
                        'smaller, lower num_workers, or leave such images out with --cfg-options '
                        f'env_cfg.max_pixels=N ({one_line(error, 100)})'
                    ) from error
                if not loads:
                    # A fault of the transform as likely as of the image: it keeps its traceback.
                    print_log(f'{kind} failed on {name}', 'current', logging.ERROR)
                    raise
                mask = data.get('seg_map_path') if 'Annot' in kind else None
                problem = _thin_mask(data) if mask else None
                if 'Annot' in kind and not mask:
                    problem = self._bad_annotation(transform, data, error)
                self._leave_out(problem or _reading_problem(str(mask or name), error), error)
                return None
            if result is None:
                if loads or not self.training:
                    self._leave_out(f'{name} was given up by {kind}')
                return None
            data = result
            if loads and (problem := self._misfit(data)):
                self._leave_out(problem)
                return None
        self.in_a_row = 0
        return data

    def _bad_annotation(self, transform: Callable, data: dict, error: Exception) -> str:
        """What cannot be loaded of the annotations of an image."""
        where = ''
        for number, one in enumerate(data.get('instances') or ()):
            try:
                transform({**data, 'instances': [one]})
            except Exception as fault:
                where, error = f'instances[{number}] ({shortened(one)}) of ', fault
                break
        return (
            f'{self.ann_file}: {where}image {data.get("img_id")} ({data.get("img_path")}) cannot '
            f'be loaded ({reason(error)})'
        )

    def _misfit(self, data: dict) -> str | None:
        """What does not fit in what was just loaded: size of the image, label map."""
        wanted, found = (data.get('height'), data.get('width')), data.get('ori_shape')
        if found is not None and None not in wanted and tuple(found[:2]) != wanted:
            problem = (
                f'{data.get("img_path")} is {found[1]}x{found[0]}, but the annotation file says '
                f'{wanted[1]}x{wanted[0]}'
            )
            if self.loads_masks:
                return problem
            if not self.told_of_size:
                why = 'since only boxes are loaded; other images of this data set are not named'
                warn(f'{problem}. It is used, {why}')
            self.told_of_size = True
        labels = data.get('gt_seg_map')
        # Only mmseg's label maps number the data set's classes; it notes this key with them.
        if labels is None or found is None or 'reduce_zero_label' not in data:
            return None
        if labels.ndim != 2 and (thin := _thin_mask(data)):
            return thin
        names = str(data.get('seg_map_path')), str(data['img_path'])
        shift = int(bool(data['reduce_zero_label']))
        size = tuple(found[:2])
        return mask_problem(labels, size, *names, self.num_classes, shift, self.ignored)

    def _leave_out(self, problem: str, cause: Exception | None = None) -> None:
        if not self.training:
            raise BadSampleError(
                f'{problem}. It is not left out, because the scores would be of other images'
            ) from cause
        if problem not in self.bad:
            self.bad.add(problem)
            warn(f'left out of training: {problem}')
        self.in_a_row += 1
        number = len(self.bad)
        many = number > MAX_BAD and number > MAX_BAD_SHARE * self.num_read
        if many or self.in_a_row >= MAX_IN_A_ROW:
            raise BadSampleError(
                f'{number} of {self.num_read} samples cannot be used, which is too many to leave '
                f'them out; the last: {problem}'
            ) from cause


def guard(
    dataset: Any,
    training: bool,
    model: torch.nn.Module | None = None,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Guard mmengine's pipelines, of a data set and of those inside it, against unusable images.

    Images of more than ``max_pixels`` are such. Labels that the data set or a part of the model
    ignores are none of a class.
    """
    parts = [] if model is None else list(model.modules())
    for leaf in leaves(dataset):
        found = [getattr(part, 'ignore_index', None) for part in (*parts, leaf)]
        ignored = {255, *(index for index in found if type(index) is int)}
        pipeline: Any = getattr(leaf, 'pipeline', None)
        if type(pipeline) is Compose:
            number = len(classes_of(leaf)) or None
            leaf.pipeline = GuardedPipeline(
                pipeline.transforms,
                training,
                number,
                ignored,
                str(getattr(leaf, 'ann_file', '')),
                max_pixels,
            )
