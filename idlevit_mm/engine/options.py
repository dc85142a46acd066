"""What options of the tools change in a config."""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device

from ..errors import UsageError
from .checks import class_of, evaluators_of, leaf_datasets
from .processes import say
from .settings import part_of

_PICKLES = ('.pkl', '.pickle')
# Prefix of the hook that paints, and the visualiser, of each task.
_PAINTERS = {
    'detection': ('Det', 'DetLocalVisualizer'),
    'segmentation': ('Seg', 'SegLocalVisualizer'),
    'classification': ('', 'UniversalVisualizer'),
}
_TTA_MODELS = {'segmentation': 'SegTTAModel', 'classification': 'AverageClsScoreTTA'}
_FILE_SUFFIXES = ('.json', '.png', '.jpg', '.jpeg', '.csv', '.txt', '.pth', '.npy', '.npz')


class Overrides(DictAction):
    """``KEY=VALUE ...`` as mmengine reads it; what it cannot read ends the tool in one line."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        for value in values:
            try:
                super().__call__(parser, argparse.Namespace(), [value])
            except (ValueError, AssertionError, IndexError, RecursionError):
                parser.error(
                    f'{option_string} {value}: allowed are KEY=VALUE with numbers, words, True, '
                    'False, None, and lists and tuples of them; dicts go by KEY.NAME=VALUE, or '
                    'into a config'
                )
        super().__call__(parser, namespace, values, option_string)


def set_precision(cfg: Config, amp: bool) -> None:
    """Do as ``--amp`` says; mixed precision is refused where mmengine would fail with it later."""
    kind = class_of(cfg.optim_wrapper.get('type', 'OptimWrapper'))[1]
    if amp and 'Amp' in kind:
        raise UsageError(f'--amp: the config trains in mixed precision already ({kind})')
    if amp and kind != 'OptimWrapper':
        raise UsageError(f'--amp replaces OptimWrapper, but optim_wrapper.type is {kind}')
    if get_device() == 'cpu' and (amp or kind == 'AmpOptimWrapper'):
        raise UsageError(
            '--amp needs an accelerator; mixed precision does not train on the CPU'
            if amp
            else 'the config trains in mixed precision (optim_wrapper.type is AmpOptimWrapper), '
            'which needs an accelerator; on the CPU: --cfg-options optim_wrapper.type=OptimWrapper'
        )
    if amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def scale_lr(cfg: Config) -> None:
    """Have mmengine scale the learning rate, as ``--auto-scale-lr`` says."""
    if not isinstance((cfg.get('auto_scale_lr') or {}).get('base_batch_size'), int):
        raise UsageError(
            '--auto-scale-lr needs the batch size that the learning rate was chosen for: '
            '--cfg-options auto_scale_lr.base_batch_size=16'
        )
    cfg.auto_scale_lr.enable = True


def write_predictions(cfg: Config, task: str, out: str) -> None:
    """Make the evaluator write what ``--out`` asks for: predictions, or label maps as PNGs."""
    is_pickle, meant = out.endswith(_PICKLES), 'a file that ends in .pkl'
    meant = f'a folder for PNGs, or {meant}' if task == 'segmentation' else meant
    if not is_pickle and (task != 'segmentation' or out.lower().endswith(_FILE_SUFFIXES)):
        raise UsageError(f'--out {out}: for {task} this is {meant}')
    if os.path.isdir(out) if is_pickle else os.path.isfile(out):
        kind = 'folder' if is_pickle else 'file'
        raise UsageError(f'--out {out} exists already and is a {kind}')
    evaluators = evaluators_of(cfg, 'test')
    if is_pickle:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        kind = 'mmdet.DumpDetResults' if task == 'detection' else 'mmengine.DumpResults'
        cfg.test_evaluator = [*evaluators, ConfigDict(type=kind, out_file_path=out)]
        return
    for evaluator in evaluators:
        if class_of(evaluator.get('type'))[1] in ('IoUMetric', 'CityscapesMetric'):
            evaluator['output_dir'] = out
            return
    raise UsageError(
        f'--out {out}: no metric of test_evaluator writes label maps (IoUMetric does); use a .pkl'
    )


def paint(cfg: Config, task: str, show_dir: str) -> None:
    """Make the visualisation hook paint every test image into the folder of ``--show-dir``."""
    if os.path.isfile(show_dir):
        raise UsageError(f'--show-dir {show_dir} is a file')
    folder, (prefix, painter) = os.path.abspath(show_dir), _PAINTERS[task]
    hooks = cfg.setdefault('default_hooks', ConfigDict())
    if hooks.get('visualization') is None:
        hooks['visualization'] = ConfigDict(type=f'{prefix}VisualizationHook')
    if cfg.get('visualizer') is None:
        cfg.visualizer = ConfigDict(type=painter, name='visualizer')
    if task == 'classification':
        hooks.visualization.update(enable=True, interval=1, out_dir=folder)
        return
    hooks.visualization.draw = True
    if task == 'detection':
        hooks.visualization.test_out_dir = folder
    else:
        # This hook has no folder of its own: it paints where the visualiser stores images, and
        # only every interval-th batch.
        hooks.visualization.interval = 1
        cfg.visualizer.vis_backends = [ConfigDict(type='LocalVisBackend', img_save_dir=folder)]


def augment(cfg: Config, task: str) -> None:
    """Wrap the model and the pipeline for test time augmentation, as ``--tta`` says."""
    detection = task == 'detection'
    if task == 'classification' and part_of(cfg, 'default_hooks.visualization').get('enable'):
        raise UsageError('--tta and --show-dir: mmpretrain paints single images, no augmented ones')
    metrics = [evaluator.get('metric') or () for evaluator in evaluators_of(cfg, 'test')]
    if detection and any('segm' in metric for metric in metrics):
        raise UsageError(
            '--tta merges boxes only, but test_evaluator measures masks: add --cfg-options '
            'test_evaluator.metric=bbox'
        )
    sets = [dataset for _, dataset in leaf_datasets(cfg.test_dataloader.dataset, 'test')]
    if cfg.get('tta_model') is None:
        nms = dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100)
        cfg.tta_model = (
            dict(type='DetTTAModel', tta_cfg=nms) if detection else dict(type=_TTA_MODELS[task])
        )
        say('The config has no tta_model: using the default.')
    if cfg.get('tta_pipeline') is None:
        if not sets or not sets[0].get('pipeline'):
            raise UsageError('--tta: test_dataloader.dataset has no pipeline to augment')
        cfg.tta_pipeline = _flip_pipeline(copy.deepcopy(sets[0]['pipeline']), task)
        say('The config has no tta_pipeline: averaging over horizontal flips.')
    for dataset in sets:
        dataset['pipeline'] = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def _flip_pipeline(pipeline: list[dict], task: str) -> list[dict]:
    """Turn a test pipeline into one that yields an image and its mirror image."""
    pack = pipeline.pop()
    # The unflipped image comes first: its annotations are the ones that are compared.
    flips = [dict(type='RandomFlip', prob=prob) for prob in (0.0, 1.0)]
    loads = [step for step in pipeline if step['type'] == 'LoadAnnotations']
    if task == 'detection':
        # Boxes are flipped back, so the flip has to be on record.
        keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
        keys = (*pack.get('meta_keys', keys), 'flip', 'flip_direction')
        pack['meta_keys'] = tuple(dict.fromkeys(keys))
        loads = []
    # Segmentors load annotations after the flip, so that both copies hold the true ones.
    pipeline = [step for step in pipeline if step not in loads]
    stages = [flips, *([step] for step in loads), [pack]]
    return [*pipeline, dict(type='TestTimeAug', transforms=stages)]
