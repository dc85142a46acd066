"""What is wrong with a data set as a whole, by itself and against the model."""

from __future__ import annotations

import logging
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.fileio import load
from mmengine.logging import print_log

from ..errors import SettingError, UsageError, one_line, shortened
from .data_checks import first_problem
from .settings import with_likely_word

_NAMED = 3
# What data sets raise while they read annotations; SyntaxError is that of XML.
_FAULTS = (
    *(ValueError, KeyError, TypeError, AssertionError, IndexError, OSError),
    *(AttributeError, SyntaxError, RuntimeError),
)
# Modules of this name read text, which says what the classes are: GLIP, Grounding DINO, SAN.
_READS_TEXT = ('language_model', 'text_encoder')
# Modules that have a number of classes, but not of those of the data set.
_OTHERS = re.compile(r'(^|\.)backbone(\.|$)|rpn_head|semantic_head')
# Heads that index by the labels of the data set, unless somebody else wrote them.
_LEARNS_LABELS = re.compile(
    r'((roi_head\.)?(bbox|mask)_head|decode_head)(\.\d+)?|panoptic_head|head'
)
_KNOWN_LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain', 'idlevit_mm', 'torch')


def warn(text: str) -> None:
    """Log a warning."""
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


def classes_of(leaf: Any) -> list[str]:
    """Names of the classes of a data set; none where it does not tell."""
    classes = (getattr(leaf, 'metainfo', None) or {}).get('classes')
    return list(classes) if isinstance(classes, (list, tuple)) else []


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
    except _FAULTS as error:
        dataset = config.get('dataset')
        dataset = dataset if isinstance(dataset, dict) else {}
        file = dataset.get('ann_file')
        about = f' (ann_file {file})' if file else ''
        path = Path(dataset.get('data_root') or '', str(file))
        if 'Coco' in str(dataset.get('type')) and path.is_file():
            # The error names neither the entry nor the table.
            about += f', which {problem},' if (problem := first_problem(path)) else ''
        else:
            about += _entry(error)
        text = with_likely_word(one_line(error, 300))
        reason = f' does not build{about}: {type(error).__name__}: {text}'
        if 'need at least one array to concatenate' in reason:
            # BaseDataset joins the records of all images, and there are none.
            reason = (
                f'{about}: no image is left: the annotation file lists none, or none has a box of '
                'one of the classes (metainfo.classes against its categories, filter_cfg)'
            )
        raise SettingError(f'{phase}_dataloader{reason}') from error


def _entry(error: BaseException) -> str:
    """The entry of an annotation file that a data set was reading."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for name in ('img_info', 'raw_data_info', 'raw_img_info', 'data_info', 'line'):
            if entry := frame.f_locals.get(name):
                return f' at {one_line(ValueError(repr(entry)), 400)}'
    return ''


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
    classes = classes_of(leaf)
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
        warn(f'{text}. {why}')


def _check_categories(leaf: Any, where: str) -> None:
    """Tell whether a file that lacks some categories would give the others wrong labels."""
    classes, ids = classes_of(leaf), getattr(leaf, 'cat_ids', None)
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
    warn(text)


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
        warn(
            f'{where}: {len(lonely)} masks of {masks} have no image in {images} and are not used: '
            f'{shortened(lonely, _NAMED)}'
        )
