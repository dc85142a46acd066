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
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.dataset import Compose
from mmengine.fileio import load
from mmengine.logging import print_log

from ..errors import BadSampleError, SettingError, UsageError, one_line, shortened
from .data_checks import load_annotations, mask_problem

# Up to this many different files may be unusable, and beyond it this share of what was read.
MAX_BAD = 10
MAX_BAD_SHARE = 0.01
# Another image is drawn at random: where so many in turn are unusable, none is usable.
MAX_IN_A_ROW = 50
_NAMED = 3
# Modules of this name read text, which says what the classes are: GLIP, Grounding DINO, SAN.
_READS_TEXT = ('language_model', 'text_encoder')
# Modules that have a number of classes, but not of those of the data set.
_OTHERS = re.compile(r'(^|\.)backbone(\.|$)|rpn_head|semantic_head')
# Heads that index by the labels of the data set, unless somebody else wrote them.
_LEARNS_LABELS = re.compile(r'((roi_head\.)?(bbox|mask)_head|decode_head)(\.\d+)?|panoptic_head')
_KNOWN_LIBRARIES = ('mmdet', 'mmseg', 'idlevit_mm', 'torch')


def _warn(text: str) -> None:
    print_log(text, 'current', logging.WARNING)


def leaves(dataset: Any) -> Iterator[Any]:
    """The built data sets that read files themselves, below wrappers such as ConcatDataset."""
    parts = getattr(dataset, 'datasets', None)
    if not isinstance(parts, (list, tuple)):
        part = getattr(dataset, 'dataset', None)
        parts = [] if part is None else [part]
    for part in parts:
        yield from leaves(part)
    if not parts:
        yield dataset


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


class GuardedPipeline(Compose):
    """A pipeline that leaves unusable images out of training, and refuses them elsewhere.

    Args:
        transforms: The transforms of the pipeline that it replaces.
        training: Whether they are left out, with a warning each.
        num_classes: Number of classes that label maps may number, None if unknown.
        ignored: Labels beyond them that are ignored.
    """

    def __init__(
        self,
        transforms: Sequence[Callable],
        training: bool,
        num_classes: int | None,
        ignored: Collection[int] = (255,),
    ) -> None:
        super().__init__(None)
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
        for transform in self.transforms:
            kind = type(transform).__name__
            loads = kind.startswith('Load')
            try:
                result = transform(data)
            except Exception as error:
                if not loads:
                    # A fault of the transform as likely as of the image: it keeps its traceback.
                    print_log(f'{kind} failed on {name}', 'current', logging.ERROR)
                    raise
                mask = data.get('seg_map_path') if 'Annot' in kind else None
                thin = _thin_mask(data) if mask else None
                self._leave_out(thin or _reading_problem(str(mask or name), error), error)
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
                _warn(f'{problem}. It is used, {why}')
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
            _warn(f'left out of training: {problem}')
        self.in_a_row += 1
        number = len(self.bad)
        many = number > MAX_BAD and number > MAX_BAD_SHARE * self.num_read
        if many or self.in_a_row >= MAX_IN_A_ROW:
            raise BadSampleError(
                f'{number} of {self.num_read} samples cannot be used, which is too many to leave '
                f'them out; the last: {problem}'
            ) from cause


def _classes(leaf: Any) -> list[str]:
    """Names of the classes of a data set; none where it does not tell."""
    classes = (getattr(leaf, 'metainfo', None) or {}).get('classes')
    return list(classes) if isinstance(classes, (list, tuple)) else []


def guard(dataset: Any, training: bool, model: torch.nn.Module | None = None) -> None:
    """Guard mmengine's pipelines, of a data set and of those inside it, against unusable images.

    Labels that the data set or a part of the model ignores are none of a class.
    """
    parts = [] if model is None else list(model.modules())
    for leaf in leaves(dataset):
        found = [getattr(part, 'ignore_index', None) for part in (*parts, leaf)]
        ignored = {255, *(index for index in found if type(index) is int)}
        pipeline: Any = getattr(leaf, 'pipeline', None)
        if type(pipeline) is Compose:
            number = len(_classes(leaf)) or None
            leaf.pipeline = GuardedPipeline(pipeline.transforms, training, number, ignored)


@contextmanager
def naming_the_data(phase: str, config: dict) -> Iterator[None]:
    """Say which data set an exception is about that it caused while it was built.

    Args:
        phase: ``'train'``, ``'val'`` or ``'test'``.
        config: Config of the data loader.

    Raises:
        SettingError: An annotation file is malformed, or a setting is wrong.
    """
    try:
        yield
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AssertionError, IndexError, OSError) as error:
        dataset = config.get('dataset')
        dataset = dataset if isinstance(dataset, dict) else {}
        file = dataset.get('ann_file')
        about = f' (ann_file {file})' if file else ''
        path = Path(dataset.get('data_root') or '', str(file))
        if 'Coco' in str(dataset.get('type')) and path.is_file():
            # The error names neither the entry nor the table.
            about += f', which {problem},' if (problem := load_annotations(path)[1]) else ''
        reason = f' does not build{about}: {type(error).__name__}: {one_line(error, 200)}'
        if 'need at least one array to concatenate' in reason:
            # BaseDataset joins the records of all images, and there are none.
            reason = (
                f'{about}: no image is left: the annotation file lists none, or none has a box of '
                'one of the classes (metainfo.classes against its categories, filter_cfg)'
            )
        raise SettingError(f'{phase}_dataloader{reason}') from error


def check_built(dataset: Any, model: torch.nn.Module, phase: str) -> None:
    """Check a built data set, by itself and against the model, before the first iteration.

    Raises:
        SettingError: A head that learns their labels has fewer classes than the data, the
            annotation file lacks classes so that labels would shift, or there is no box to learn
            or to measure.
    """
    heads = class_counts(model)
    modules = dict(model.named_modules())
    needed = {
        name
        for name in heads
        if phase == 'train'
        and _LEARNS_LABELS.fullmatch(name)
        and type(modules[name]).__module__.partition('.')[0] in _KNOWN_LIBRARIES
        and not getattr(modules[name], 'class_agnostic', False)
    }
    for leaf in leaves(dataset):
        where = f'{type(leaf).__name__} of {phase}_dataloader'
        _check_categories(leaf, where)
        _check_heads(leaf, heads, where, needed)
        if phase != 'test':
            # A test set may come without annotations.
            _check_boxes(leaf, where)
        _warn_of_lonely_masks(leaf, where)


def class_counts(model: torch.nn.Module) -> dict[str, int]:
    """``num_classes`` of every head that tells the data set's classes apart, by dotted name.

    Region proposal heads know objects only, semantic branches of detectors have classes of their
    own, and where text says what the classes are, ``num_classes`` does not number them.
    """
    modules = dict(model.named_modules())
    if any(name.rpartition('.')[2] in _READS_TEXT for name in modules):
        return {}
    heads = [name for name in modules if 'head' in name and not _OTHERS.search(name)]
    counts = {name: getattr(modules[name], 'num_classes', None) for name in heads}
    return {name: count for name, count in counts.items() if type(count) is int}


def _check_heads(leaf: Any, heads: dict[str, int], where: str, needed: set[str]) -> None:
    """Compare numbers of classes; those that differ are warned of.

    Fewer than the data have are refused for ``needed`` heads, whose losses index by labels.
    """
    classes = _classes(leaf)
    for name, number in heads.items() if classes else ():
        # In panoptic data, heads of boxes and instances know things only. With classes of a
        # person's own, mmdet's list of things stays as it is and says nothing.
        things = leaf.metainfo.get('thing_classes') or classes
        told_apart = classes if 'panoptic' in name else things
        if number == len(told_apart) or not set(told_apart) <= set(classes):
            continue
        text = (
            f'model.{name}.num_classes={number}, but {where} has {len(told_apart)} classes '
            f'({shortened(told_apart, _NAMED)})'
        )
        if number < len(told_apart) and name in needed:
            raise SettingError(
                f'{text}. Make them agree: num_classes of every head, or '
                'metainfo=dict(classes=...) of every data set'
            )
        why = 'Nothing is learned of the others, and an evaluator may stop at a prediction of one'
        if number < len(told_apart):
            why = 'It cannot learn labels beyond its own'
        _warn(f'{text}. {why}')


def _check_categories(leaf: Any, where: str) -> None:
    """Tell whether a file that lacks some categories would give the others wrong labels."""
    classes, ids = _classes(leaf), getattr(leaf, 'cat_ids', None)
    if not isinstance(ids, (list, tuple)) or len(ids) >= len(classes):
        return
    names = [entry['name'] for entry in load(leaf.ann_file)['categories']]
    found = [name for name in names if name in classes]
    text = (
        f'{where} has {len(classes)} classes ({shortened(classes, _NAMED)}), but {leaf.ann_file} '
        f'has categories of these names for {len(found)} only'
    )
    # mmdet numbers the categories that it finds, so only a gap before one of them shifts labels.
    if not found or found != classes[: len(found)]:
        raise SettingError(f'{text}. Name those of the file in metainfo=dict(classes=...)')
    _warn(text)


def _check_boxes(leaf: Any, where: str) -> None:
    if getattr(leaf, 'cat_ids', None) is None or not hasattr(leaf, 'get_data_info'):
        return
    infos = map(leaf.get_data_info, range(len(leaf)))
    if not any(info.get('instances', True) for info in infos):
        raise SettingError(
            f'{where}: {leaf.ann_file} has no box in any of {len(leaf)} images, there is nothing '
            'to learn or to measure'
        )


def _warn_of_lonely_masks(leaf: Any, where: str) -> None:
    """Warn of label maps without an image, which mmseg passes over in silence."""
    prefix = getattr(leaf, 'data_prefix', None) or {}
    images, masks = prefix.get('img_path'), prefix.get('seg_map_path')
    suffix, file = getattr(leaf, 'seg_map_suffix', None), getattr(leaf, 'ann_file', None)
    # With a list of files, masks beside it are expected.
    listed = isinstance(file, str) and os.path.isfile(file)
    if not (images and masks and suffix) or listed or not os.path.isdir(masks):
        return
    infos = map(leaf.get_data_info, range(len(leaf)))
    known = {os.path.basename(info['seg_map_path'] or '') for info in infos}
    there = {name for name in os.listdir(masks) if name.endswith(suffix)}
    if lonely := sorted(there - known):
        _warn(
            f'{where}: {len(lonely)} masks of {masks} have no image in {images} and are not used: '
            f'{shortened(lonely, _NAMED)}'
        )
