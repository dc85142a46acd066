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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.dataset import Compose
from mmengine.fileio import load
from mmengine.logging import print_log

from ..errors import BadSampleError, SettingError, UsageError, one_line, shortened

# Up to this many different files may be unusable, and beyond it this share of what was read.
MAX_BAD = 10
MAX_BAD_SHARE = 0.01
# Another image is drawn at random: where so many in turn are unusable, none is usable.
MAX_IN_A_ROW = 50
_IGNORED = 255
_NAMED = 3
# Modules of this name read text, which says what the classes are: GLIP, Grounding DINO, SAN.
_READS_TEXT = ('language_model', 'text_encoder')


def leaves(dataset: Any) -> Iterator[Any]:
    """The data sets that read files themselves, below wrappers such as ConcatDataset."""
    if isinstance(inner := getattr(dataset, 'datasets', None), (list, tuple)):
        for part in inner:
            yield from leaves(part)
    elif (inner := getattr(dataset, 'dataset', None)) is not None:
        yield from leaves(inner)
    else:
        yield dataset


def reading_problem(path: str, error: BaseException) -> str:
    """Why a file could not be loaded."""
    if isinstance(error, FileNotFoundError):
        return f'{path} does not exist'
    if os.path.isfile(path) and os.path.getsize(path) == 0:
        return f'{path} is empty'
    reason = one_line(error, 200)
    # What mmcv says when OpenCV gives no image.
    reason = 'not an image, or cut off' if 'failed to load image' in reason else reason
    return f'{path} cannot be read ({reason})'


def size_problem(data: dict[str, Any]) -> str | None:
    """Whether an image that was just loaded has another size than its annotations are for."""
    wanted, found = (data.get('height'), data.get('width')), data.get('ori_shape')
    if found is None or None in wanted or tuple(found[:2]) == wanted:
        return None
    return (
        f'{data.get("img_path")} is {found[1]}x{found[0]}, but the annotation file says '
        f'{wanted[1]}x{wanted[0]}'
    )


def thin_mask(data: dict[str, Any]) -> str | None:
    """Whether mmseg, which drops axes of length 1, cannot load the mask of a thin image."""
    if 1 not in tuple(data.get('ori_shape', ())[:2]):
        return None
    return f'{data.get("seg_map_path")} is one pixel high or wide, which mmseg cannot load'


def mask_problem(data: dict[str, Any], num_classes: int | None) -> str | None:
    """What is wrong with a label map that was just loaded, if there is one and anything is.

    Args:
        data: As the pipeline knows it: ``gt_seg_map`` (H, W) and ``ori_shape``.
        num_classes: Number of classes, None if unknown.
    """
    labels = data.get('gt_seg_map')
    # Only mmseg's label maps number the data set's classes; it notes this key with them.
    if labels is None or 'reduce_zero_label' not in data:
        return None
    path = data.get('seg_map_path')
    if labels.ndim != 2 and (thin := thin_mask(data)):
        return thin
    if labels.ndim != 2:
        return f'{path} has {labels.shape[-1]} channels instead of one'
    shape = tuple(data['ori_shape'][:2])
    if labels.shape != shape:
        return (
            f'{path} is {labels.shape[1]}x{labels.shape[0]}, but its image {data["img_path"]} '
            f'{shape[1]}x{shape[0]}'
        )
    if num_classes is None:
        return None
    present = np.flatnonzero(np.bincount(labels.ravel(), minlength=_IGNORED + 1))
    beyond = [int(value) for value in present if num_classes <= value != _IGNORED]
    if not beyond:
        return None
    # The number in the file, not the one that it became.
    shift = int(bool(data['reduce_zero_label']))
    return (
        f'{path} holds the value {beyond[0] + shift}, but with {num_classes} classes the largest '
        f'is {num_classes - 1 + shift}'
    )


class GuardedPipeline(Compose):
    """A pipeline that knows what to do with an image that cannot be loaded.

    Args:
        transforms: The transforms of the pipeline that it replaces.
        training: Leave unusable images out, with a warning each; else they are errors.
        num_classes: Number of classes that label maps may number, None if unknown.
    """

    def __init__(
        self,
        transforms: Sequence[Callable[[dict], dict | None]],
        training: bool,
        num_classes: int | None,
    ) -> None:
        super().__init__(None)
        self.transforms = list(transforms)
        self.training = training
        self.num_classes = num_classes
        self.num_read = 0
        self.in_a_row = 0
        self.bad: set[str] = set()
        # Boxes are scaled by the size that was found, so only masks must have that of the file.
        self.loads_masks = any(
            getattr(transform, 'with_mask', False) or getattr(transform, 'with_seg', False)
            for transform in self.transforms
        )
        self.told_of_size = False

    def __call__(self, data: dict) -> dict | None:
        """Load and transform one image.

        Returns:
            What the transforms make of it; in training None if it cannot be used, so that the
            data set takes another.

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
                thin = mask is not None and thin_mask(data)
                self._leave_out(thin or reading_problem(str(mask or name), error), error)
                return None
            if result is None:
                if loads or not self.training:
                    self._leave_out(f'{name} was given up by {kind}')
                return None
            data = result
            problem = self._misfit(data) if loads else None
            if problem is not None:
                self._leave_out(problem)
                return None
        self.in_a_row = 0
        return data

    def _misfit(self, data: dict) -> str | None:
        problem = size_problem(data)
        if problem is not None and not self.loads_masks:
            if not self.told_of_size:
                self.told_of_size = True
                print_log(
                    f'{problem}. It is used, since only boxes are loaded; other images of this '
                    'data set are not named',
                    'current',
                    logging.WARNING,
                )
            problem = None
        return problem or mask_problem(data, self.num_classes)

    def _leave_out(self, problem: str, cause: Exception | None = None) -> None:
        if not self.training:
            raise BadSampleError(
                f'{problem}. It is not left out, because the scores would be of other images'
            ) from cause
        if problem not in self.bad:
            self.bad.add(problem)
            print_log(f'left out of training: {problem}', 'current', logging.WARNING)
        self.in_a_row += 1
        number = len(self.bad)
        many = number > MAX_BAD and number > MAX_BAD_SHARE * self.num_read
        if many or self.in_a_row >= MAX_IN_A_ROW:
            raise BadSampleError(
                f'{number} of {self.num_read} samples cannot be used, which is too many to leave '
                f'them out; the last: {problem}'
            ) from cause


def guard(dataset: Any, training: bool) -> None:
    """Guard the pipelines of a data set, and of those inside it, against unusable images.

    Args:
        dataset: Built data set. Those without one of mmengine's pipelines stay as they are.
        training: As for :class:`GuardedPipeline`.
    """
    for leaf in leaves(dataset):
        pipeline = getattr(leaf, 'pipeline', None)
        if isinstance(pipeline, Compose) and type(pipeline) is Compose:
            classes = (getattr(leaf, 'metainfo', None) or {}).get('classes')
            number = len(classes) if isinstance(classes, (list, tuple)) else None
            leaf.pipeline = GuardedPipeline(pipeline.transforms, training, number)


# ---------------------------------------------------------------------------- whole data sets


@contextmanager
def naming_the_data(phase: str, config: dict) -> Iterator[None]:
    """Say which data set an exception is about that it caused while it was built.

    Args:
        phase: ``'train'``, ``'val'`` or ``'test'``.
        config: Config of the data loader.

    Raises:
        SettingError: For the exceptions that a malformed annotation file or a wrong setting cause.
    """
    try:
        yield
    except UsageError:
        raise
    except (ValueError, KeyError, TypeError, AssertionError, IndexError, OSError) as error:
        dataset = config.get('dataset')
        file = dataset.get('ann_file') if isinstance(dataset, dict) else None
        about = f' (ann_file {file})' if file else ''
        reason = one_line(error, 200)
        if 'need at least one array to concatenate' in reason:
            # BaseDataset joins the records of all images, and there are none.
            reason = (
                'no image is left: the annotation file lists none, or none has a box of one of the '
                'classes (metainfo.classes against its categories, filter_cfg)'
            )
        raise SettingError(
            f'{phase}_dataloader does not build{about}: {type(error).__name__}: {reason}'
            if not reason.startswith('no image')
            else f'{phase}_dataloader{about}: {reason}'
        ) from error


def class_counts(model: torch.nn.Module) -> Iterator[tuple[str, int]]:
    """Name and ``num_classes`` of every head that tells the data set's classes apart.

    Region proposal heads know objects only, and semantic branches of detectors have classes of
    their own. Where text says what the classes are, ``num_classes`` does not number them: such
    models have none.
    """
    named_modules = dict(model.named_modules())
    if any(name.rpartition('.')[2] in _READS_TEXT for name in named_modules):
        return
    for name, module in named_modules.items():
        number = getattr(module, 'num_classes', None)
        if is_class_head(name) and isinstance(number, int) and not isinstance(number, bool):
            yield name, number


def is_class_head(name: str) -> bool:
    """Whether a module's dotted name is that of a head for the data set's classes."""
    parts = name.split('.')
    return (
        'backbone' not in parts
        and any('head' in part for part in parts)
        and not any('rpn_head' in part or 'semantic_head' in part for part in parts)
    )


def classes_of(metainfo: dict[str, Any], head: str) -> Sequence[str] | None:
    """The classes of a data set that a head tells apart; None if that is not known.

    Args:
        metainfo: Of the data set.
        head: Dotted name of the head.
    """
    classes, things = metainfo.get('classes'), metainfo.get('thing_classes')
    if not isinstance(classes, (list, tuple)):
        return None
    if not isinstance(things, (list, tuple)) or 'panoptic' in head:
        return classes
    # In panoptic data, heads of boxes and instances know things only. With classes of a person's
    # own, mmdet's list of things stays as it is and says nothing.
    return things if set(things) <= set(classes) else None


def check_classes(dataset: Any, model: torch.nn.Module, phase: str) -> None:
    """Check that heads and data set agree on the number of classes; warn of heads with more.

    Raises:
        SettingError: A head has fewer classes, so that labels would be beyond its last one, or the
            annotation file lacks classes so that labels would shift.
    """
    counts = list(class_counts(model))
    for leaf in leaves(dataset):
        metainfo = getattr(leaf, 'metainfo', None) or {}
        kind, classes = type(leaf).__name__, metainfo.get('classes')
        ids = getattr(leaf, 'cat_ids', None)
        if (
            isinstance(classes, (list, tuple))
            and isinstance(ids, (list, tuple))
            and len(ids) < len(classes)
        ):
            _check_missing_categories(leaf, classes, phase)
        for name, number in counts:
            told_apart = classes_of(metainfo, name)
            if told_apart is None or number == len(told_apart):
                continue
            text = (
                f'model.{name}.num_classes={number}, but {kind} of {phase}_dataloader has '
                f'{len(told_apart)} classes ({shortened(told_apart, _NAMED)})'
            )
            if number < len(told_apart):
                raise SettingError(
                    f'{text}. Make them agree: num_classes of every head, or '
                    'metainfo=dict(classes=...) of every data set'
                )
            print_log(
                f'{text}. Nothing is learned of the others, and an evaluator may stop at a '
                'prediction of one',
                'current',
                logging.WARNING,
            )


def _check_missing_categories(leaf: Any, classes: Sequence[str], phase: str) -> None:
    """Tell whether a file that lacks some categories would give the others wrong labels."""
    names = [entry['name'] for entry in load(leaf.ann_file)['categories']]
    found = [name for name in names if name in classes]
    text = (
        f'{phase}_dataloader: {type(leaf).__name__} has {len(classes)} classes '
        f'({shortened(classes, _NAMED)}), but {leaf.ann_file} has categories of these names for '
        f'{len(found)} only'
    )
    # mmdet numbers the categories that it finds, so only a gap before one of them shifts labels.
    if found and found == list(classes[: len(found)]):
        print_log(text, 'current', logging.WARNING)
        return
    raise SettingError(f'{text}. Name those of the file in metainfo=dict(classes=...)')


def check_boxes(dataset: Any, phase: str) -> None:
    """Check that a detection data set has a box at all.

    Raises:
        SettingError: It has none, so that there is nothing to learn or to measure.
    """
    for leaf in leaves(dataset):
        if getattr(leaf, 'cat_ids', None) is None or not hasattr(leaf, 'get_data_info'):
            continue
        infos = (leaf.get_data_info(index) for index in range(len(leaf)))
        if not any(info.get('instances', True) for info in infos):
            raise SettingError(
                f'{phase}_dataloader: {leaf.ann_file} has no box in any of {len(leaf)} images, '
                'there is nothing to learn or to measure'
            )


def warn_of_lonely_masks(dataset: Any, phase: str) -> None:
    """Warn of label maps without an image, which mmseg passes over in silence."""
    for leaf in leaves(dataset):
        prefix = getattr(leaf, 'data_prefix', None) or {}
        images, masks = prefix.get('img_path'), prefix.get('seg_map_path')
        suffixes = getattr(leaf, 'img_suffix', None), getattr(leaf, 'seg_map_suffix', None)
        # With a list of files, masks beside it are expected.
        listed = bool(getattr(leaf, 'ann_file', None)) and os.path.isfile(leaf.ann_file)
        if not (images and masks and all(suffixes)) or listed or not os.path.isdir(masks):
            continue
        known = {leaf.get_data_info(index)['seg_map_path'] for index in range(len(leaf))}
        names = {Path(path).name for path in known if path}
        with os.scandir(masks) as entries:
            lonely = sorted(
                entry.name
                for entry in entries
                if entry.name.endswith(suffixes[1]) and entry.name not in names
            )
        if lonely:
            print_log(
                f'{phase}_dataloader: {len(lonely)} masks of {masks} have no image in {images} '
                f'and are not used: {shortened(lonely, _NAMED)}',
                'current',
                logging.WARNING,
            )


def check_built(dataset: Any, model: torch.nn.Module, phase: str) -> None:
    """Check a built data set, by itself and against the model, before the first iteration.

    Args:
        dataset: Data set of a data loader.
        model: Built model.
        phase: ``'train'``, ``'val'`` or ``'test'``.

    Raises:
        SettingError: Classes do not fit, or there is nothing to learn or to measure.
    """
    check_classes(dataset, model, phase)
    if phase != 'test':
        # A test set may come without annotations.
        check_boxes(dataset, phase)
    warn_of_lonely_masks(dataset, phase)
