"""A picture of what the model found and left idle, while it trains, validates or tests."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from mmengine import fileio
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor, nn

from ..visualization.data_samples import content_size, picture_of, prediction_of, truth_of
from ..visualization.sheets import Content, Sheet, active_shares, draw_sheet
from .keep_ratio import idle_backbones

# What a forward pass of a backbone leaves: height and width of its input, its `keep_masks`.
Call = tuple[tuple[int, int], list[list[Tensor]]]


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
        for key, value, least in (
            ('interval', interval, 1),
            ('max_pictures', 1 if max_pictures is None else max_pictures, 1),
            ('train_interval', train_interval, 0),
        ):
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
        self._backbones: dict[str, nn.Module] = {}  # by the ends of their pictures' names
        self._calls: dict[str, list[Call]] = {}  # of the iteration that is to be drawn
        self._handles: list[Any] = []
        self._drawn = 0
        self._warned = False

    def before_run(self, runner: Runner) -> None:
        """Find the idle backbones.

        Raises:
            SettingError: There is none.
        """
        self._stop()
        found = idle_backbones(runner.model, type(self).__name__) if self.draw else {}
        # One backbone needs no name; several are told apart by their places in the model.
        self._backbones = {
            f'_{name}' if len(found) > 1 else '': backbone for name, backbone in found.items()
        }

    def _before_epoch(self, runner: Runner, mode: str = 'train') -> None:
        self._drawn = 0

    def _before_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, mode: str = 'train'
    ) -> None:
        if mode == 'train':
            due = self.train_interval and self.every_n_train_iters(runner, self.train_interval)
        else:
            due = self._drawn != self.max_pictures and batch_idx % self.interval == 0
        if due and is_main_process():
            self._stop()
            self._calls = {suffix: [] for suffix in self._backbones}
            for suffix, backbone in self._backbones.items():
                note = partial(_note, self._calls[suffix])
                self._handles.append(backbone.register_forward_hook(note, with_kwargs=True))

    def _after_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
        mode: str = 'train',
    ) -> None:
        if not self._handles:
            return
        self._stop()
        if mode == 'train':
            inputs = data_batch['inputs']
            if isinstance(inputs, dict):
                self._leave_out(runner, 'the batch has several branches')
                return
            image = picture_of(inputs[0].detach().cpu().numpy())
            size = image.shape[:2]
            found = {'Ground truth': truth_of(data_batch['data_samples'][0], size)}
            # One name for the pictures of all iterations: backends then show them as one row.
            self._draw(runner, mode, '', image, size, found, 0, len(inputs))
            return
        for index, result in enumerate(outputs):
            if self._drawn == self.max_pictures:
                return
            content = fileio.get(result.img_path, backend_args=self.backend_args)
            image = mmcv.imfrombytes(content, channel_order='rgb')
            found = {
                'Ground truth': truth_of(result, image.shape[:2]),
                'Prediction': prediction_of(result, self.score_thr),
            }
            name = f'_{self._drawn:02d}_{Path(result.img_path).stem}'
            self._draw(runner, mode, name, image, content_size(result), found, index, len(outputs))
            self._drawn += 1

    def _stop(self) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _draw(
        self,
        runner: Runner,
        mode: str,
        name: str,
        image: np.ndarray,
        size: tuple[int, int],
        found: dict[str, Content | None],
        index: int,
        batch_size: int,
    ) -> None:
        """Draw one image of a batch, once for each backbone."""
        meta = getattr(runner.visualizer, 'dataset_meta', None) or {}
        classes, palette = meta.get('classes') or (), meta.get('palette')
        shown = [(title, content) for title, content in found.items() if content is not None]
        for suffix, calls in self._calls.items():
            seen = [len(masks[0][0]) for _, masks in calls]
            if seen != [batch_size]:
                parts = f'{batch_size} images in {sum(seen)} parts'
                self._leave_out(runner, f'the backbone{suffix} saw {parts}')
                continue
            ((input_size, masks),) = calls
            shares = active_shares(masks, index)
            picture = draw_sheet(Sheet(image, classes, input_size, size, shown, shares, palette))
            full_name = f'{mode}_active_tokens{suffix}{name}'
            if self.show:
                runner.visualizer.show(picture, win_name=full_name, wait_time=self.wait_time)
            elif mode == 'test' and self.test_out_dir is not None:
                folder = Path(runner.log_dir) / self.test_out_dir
                mmcv.imwrite(picture[..., ::-1], str(folder / f'{full_name}.png'))
            else:
                runner.visualizer.add_image(full_name, picture, runner.iter + (mode == 'train'))

    def _leave_out(self, runner: Runner, reason: str) -> None:
        if not self._warned:
            runner.logger.warning(f'{type(self).__name__} leaves images out: {reason}.')
        self._warned = True


def _note(calls: list[Call], module: Any, args: tuple, kwargs: dict, output: Any) -> None:
    """Note a forward pass of a backbone."""
    images: Tensor = args[0] if args else next(iter(kwargs.values()))
    calls.append(((images.shape[-2], images.shape[-1]), module.keep_masks))
