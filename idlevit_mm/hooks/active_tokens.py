"""A picture of what the model found and left idle, while it trains, validates or tests.

Shape letters: B images of a batch, H and W of an image in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from mmengine import fileio
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from ..backbones import IdleBackbone
from ..visualization.data_samples import content_size, prediction_of, truth_of
from ..visualization.sheets import Sample, draw_sheet, stage_shares
from .keep_ratio import idle_backbones


@dataclass(frozen=True)
class BackboneCall:
    """What one forward pass of a backbone leaves for a picture.

    Attributes:
        input_size: Height and width of the input, padding included.
        keep_masks: The backbone's ``keep_masks``.
    """

    input_size: tuple[int, int]
    keep_masks: list[list[Tensor]]

    @property
    def batch_size(self) -> int:
        """Number of images that were passed together."""
        return len(self.keep_masks[0][0])


class BackboneWatch:
    """Notes the forward passes of backbones between ``start`` and ``stop``."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []
        self._calls: list[list[BackboneCall]] = []

    @property
    def active(self) -> bool:
        """Whether forward passes are being noted."""
        return bool(self._handles)

    def start(self, backbones: Sequence[IdleBackbone]) -> None:
        """Begin to note, and forget what was noted before."""
        self.stop()
        self._calls = [[] for _ in backbones]
        for backbone, calls in zip(backbones, self._calls, strict=True):
            self._handles.append(self._watch(backbone, calls))

    def stop(self) -> list[list[BackboneCall]]:
        """Take the backbones' hooks away again, and return the calls of each backbone."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        return self._calls

    @staticmethod
    def _watch(backbone: IdleBackbone, calls: list[BackboneCall]) -> RemovableHandle:
        def note(module: Any, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            images: Tensor = args[0] if args else next(iter(kwargs.values()))
            height, width = images.shape[-2:]
            calls.append(BackboneCall((height, width), module.keep_masks))

        return backbone.register_forward_hook(note, with_kwargs=True)


def image_of(inputs: Tensor) -> np.ndarray:
    """The picture that a pipeline packed, before the data preprocessor.

    Args:
        inputs: (3, H, W), blue first, as the pipelines of mmdet and mmseg load it.

    Returns:
        (H, W, 3) uint8, red first.
    """
    pixels = inputs.detach().cpu().numpy().transpose(1, 2, 0)[..., ::-1]
    return np.ascontiguousarray(pixels.round().clip(0, 255).astype(np.uint8))


@HOOKS.register_module()
class ActiveTokensVisualizationHook(Hook):
    """Draws active tokens beside predictions and ground truth, for mmdet and mmseg.

    A picture shows the image, its ground truth if the pipeline loads it, the prediction, and for
    each stage the share of its blocks in which a token was active. It goes to the backends of the
    run's visualiser. During training there is no prediction, and the picture shows the first image
    of the batch as the pipeline augmented it. With several processes the first one draws its own
    share of the images. A model with several idle backbones gets one picture for each of them.

    An image that is seen in several parts or several times (sliding windows, test time
    augmentation) has no one map of active tokens: it is left out with a warning.

    Args:
        draw: Whether to draw at all.
        interval: Draw the images of every ``interval``-th batch of a validation or a test.
        max_pictures: How many images of each validation and each test; None for no limit.
        train_interval: Training iterations from one picture to the next; 0 for none in training.
        score_thr: Predicted instances with a lower score are left out.
        show: Whether to show pictures in a window instead of sending them to the backends.
        wait_time: Seconds for which such a window stays; 0 to wait for a key.
        test_out_dir: Folder, inside that of the run's logs, for the pictures of a test; they then
            do not go to the backends.
        backend_args: How to read the images, see ``mmengine.fileio.get``.

    Raises:
        TypeError: ``interval``, ``max_pictures`` or ``train_interval`` is no whole number.
        ValueError: One of them is too small, or ``score_thr`` lies outside [0, 1].
    """

    def __init__(
        self,
        draw: bool = True,
        interval: int = 1,
        max_pictures: int | None = 4,
        train_interval: int = 0,
        score_thr: float = 0.3,
        show: bool = False,
        wait_time: float = 0.0,
        test_out_dir: str | None = None,
        backend_args: dict[str, Any] | None = None,
    ) -> None:
        name = type(self).__name__
        whole = {'interval': (interval, 1), 'train_interval': (train_interval, 0)}
        if max_pictures is not None:
            whole['max_pictures'] = (max_pictures, 1)
        for key, (value, least) in whole.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f'{name}.{key}={value!r} must be a whole number')
            if value < least:
                raise ValueError(f'{name}.{key}={value} must be at least {least}')
        if not 0 <= score_thr <= 1:
            raise ValueError(f'{name}.score_thr={score_thr} must lie in [0, 1]')
        self.draw = draw
        self.interval = interval
        self.max_pictures = max_pictures
        self.train_interval = train_interval
        self.score_thr = score_thr
        self.show = show
        self.wait_time = wait_time
        self.test_out_dir = test_out_dir
        self.backend_args = backend_args
        self._watch = BackboneWatch()
        self._names: list[str] = []
        self._backbones: list[IdleBackbone] = []
        self._drawn = 0
        self._warned = False

    def before_run(self, runner: Runner) -> None:
        """Find the idle backbones.

        Raises:
            SettingError: There is none.
        """
        self._watch.stop()
        self._backbones = idle_backbones(runner.model, type(self).__name__) if self.draw else []
        names = {module: name for name, module in runner.model.named_modules()}
        # One backbone needs no name; several are told apart by their places in the model.
        several = len(self._backbones) > 1
        self._names = [
            f'_{names[backbone].removeprefix("module.")}' if several else ''
            for backbone in self._backbones
        ]

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        if self.train_interval and self.every_n_train_iters(runner, self.train_interval):
            self._start()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        if not self._watch.active:
            return
        calls = self._watch.stop()
        inputs = data_batch['inputs']
        if isinstance(inputs, dict):
            self._leave_out(runner, 'the batch has several branches')
            return
        # One name for the pictures of all iterations: backends then show them as one row.
        data_sample = data_batch['data_samples'][0]
        image = image_of(inputs[0])
        size = (image.shape[0], image.shape[1])
        sample = self._sample(runner, '', image, size)
        sample.truth = truth_of(data_sample, size)
        self._draw(runner, 'train', runner.iter + 1, sample, calls, 0, len(inputs))

    def before_val_epoch(self, runner: Runner) -> None:
        self._drawn = 0

    def before_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._start_if_due(batch_idx)

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self._draw_results(runner, 'val', outputs)

    def before_test_epoch(self, runner: Runner) -> None:
        self._drawn = 0

    def before_test_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        self._start_if_due(batch_idx)

    def after_test_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        self._draw_results(runner, 'test', outputs)

    def _start_if_due(self, batch_idx: int) -> None:
        left = self.max_pictures is None or self._drawn < self.max_pictures
        if left and batch_idx % self.interval == 0:
            self._start()

    def _start(self) -> None:
        if self.draw and is_main_process():
            self._watch.start(self._backbones)

    def _draw_results(self, runner: Runner, phase: str, outputs: Sequence[Any]) -> None:
        """Draw what a model returned for a batch, up to the number of pictures."""
        if not self._watch.active:
            return
        calls = self._watch.stop()
        left = len(outputs) if self.max_pictures is None else self.max_pictures - self._drawn
        for index, result in enumerate(outputs[:left]):
            content = fileio.get(result.img_path, backend_args=self.backend_args)
            image = mmcv.imfrombytes(content, channel_order='rgb')
            name = f'_{self._drawn:02d}_{Path(result.img_path).stem}'
            sample = self._sample(runner, name, image, content_size(result))
            sample.truth = truth_of(result, (image.shape[0], image.shape[1]))
            sample.prediction = prediction_of(result, self.score_thr)
            self._draw(runner, phase, runner.iter, sample, calls, index, len(outputs))
            self._drawn += 1

    @staticmethod
    def _sample(runner: Runner, name: str, image: np.ndarray, content: tuple[int, int]) -> Sample:
        """A picture without what the backbone contributes."""
        meta = getattr(runner.visualizer, 'dataset_meta', None) or {}
        return Sample(
            name=name,
            image=image,
            classes=meta.get('classes') or (),
            palette=meta.get('palette'),
            shares=(),
            input_size=content,
            content_size=content,
        )

    def _draw(
        self,
        runner: Runner,
        phase: str,
        step: int,
        sample: Sample,
        calls: list[list[BackboneCall]],
        index: int,
        batch_size: int,
    ) -> None:
        """Draw one image of a batch, once for each backbone."""
        for suffix, of_backbone in zip(self._names, calls, strict=True):
            if len(of_backbone) != 1 or of_backbone[0].batch_size != batch_size:
                passes = sum(call.batch_size for call in of_backbone)
                self._leave_out(
                    runner, f'the backbone{suffix} saw {batch_size} images in {passes} parts'
                )
                continue
            call = of_backbone[0]
            shares = stage_shares(call.keep_masks, index)
            sheet = draw_sheet(replace(sample, shares=shares, input_size=call.input_size))
            self._send(runner, phase, f'{phase}_active_tokens{suffix}{sample.name}', sheet, step)

    def _send(self, runner: Runner, phase: str, name: str, sheet: np.ndarray, step: int) -> None:
        if self.show:
            runner.visualizer.show(sheet, win_name=name, wait_time=self.wait_time)
        elif phase == 'test' and self.test_out_dir is not None:
            folder = Path(runner.log_dir) / self.test_out_dir
            mmcv.imwrite(sheet[..., ::-1], str(folder / f'{name}.png'))
        else:
            runner.visualizer.add_image(name, sheet, step)

    def _leave_out(self, runner: Runner, reason: str) -> None:
        if not self._warned:
            runner.logger.warning(f'{type(self).__name__} leaves images out: {reason}.')
        self._warned = True
