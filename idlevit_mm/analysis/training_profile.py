"""Where the time of whole training iterations goes, idle against dense.

The iterations are the runner's own: its data loader, loop, hooks and optimiser wrapper. Only
checkpoints, validation and pictures are switched off.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from idlevit_mm.analysis.latency import Comparison, Spread
from idlevit_mm.analysis.meter import OTHER, Call, Label, Meter, clock, replaced
from idlevit_mm.analysis.models import KeepRatios, host_backbone, idle_backbone
from idlevit_mm.engine.checks import check_datasets
from idlevit_mm.engine.launch import build_runner
from idlevit_mm.errors import UsageError
from idlevit_mm.hooks.keep_ratio import KeepRatioHook

WAITING = 'waiting for data'
PREPROCESSING = 'preprocessing'
BACKBONE = 'backbone, forward'
NECK = 'neck, forward'
HEADS = 'heads and losses'
BACKWARD = 'backward, neck and heads'
BACKWARD_BACKBONE = 'backward, backbone'
OPTIMIZER = 'optimizer'
HOOKS_AND_REST = 'hooks and rest'
PARTS = (
    WAITING,
    PREPROCESSING,
    BACKBONE,
    NECK,
    HEADS,
    BACKWARD,
    BACKWARD_BACKBONE,
    OPTIMIZER,
    HOOKS_AND_REST,
)
DENSE, IDLE = 'dense', 'idle'


class _Ready(Exception):
    """A runner has prepared everything and would start its loop."""


@dataclass(frozen=True)
class TrainingProfile:
    """Seconds of training iterations, in turns.

    Attributes:
        parts: for each candidate ``{part: seconds in each round}``, all of ``PARTS``.
        iterations: the whole iterations.
    """

    parts: Mapping[str, Mapping[str, tuple[float, ...]]]
    iterations: Comparison


def profile_training(
    cfg: Config,
    work_dir: str | Path,
    *,
    keep_ratios: KeepRatios | None = None,
    checkpoint: str | Path | None = None,
    iters: int = 30,
    warmup: int = 3,
    reading: Callable[[], float] = clock,
) -> TrainingProfile:
    """Train an idle and a dense model in turns, in one process, and time the parts.

    The dense model is the same with the backbone's dense class (``host_backbone``).

    Args:
        cfg: A config that can be trained, with an idle backbone.
        work_dir: Where the runners write their logs.
        keep_ratios: Of the idle model; the config's when None. Hooks that change keep ratios are
            left out.
        checkpoint: Weights of the model; None leaves them random.
        iters: Timed iterations of each model.
        warmup: Iterations of each before these.
        reading: The clock, in seconds.

    Returns:
        Times by candidate: 'dense' and 'idle'.

    Raises:
        UsageError: The config cannot be trained or its data are not there.
        TypeError: The model has no idle backbone.
        ValueError: There is no dense class, or ``iters`` or ``warmup`` is not allowed.
    """
    if iters < 1 or warmup < 0:
        raise ValueError(f'iters={iters} must be at least 1 and warmup={warmup} at least 0')
    for key in ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper'):
        if cfg.get(key) is None:
            raise UsageError(f'the config cannot be trained: it has no {key}')
    check_datasets(cfg, ('train',))
    trainings: dict[str, _Training] = {}
    seen: dict[str, list[dict[str, float]]] = {DENSE: [], IDLE: []}
    try:
        for name in seen:
            own = _timing_cfg(cfg, Path(work_dir), name, checkpoint)
            trainings[name] = _Training(own, name == DENSE, keep_ratios, reading)
        for index in range(warmup + iters):
            # Who begins changes from round to round, so that drift hits both.
            for name in [DENSE, IDLE] if index % 2 else [IDLE, DENSE]:
                totals = trainings[name].step()
                if index >= warmup:
                    seen[name].append(totals)
    finally:
        for training in trainings.values():
            training.close()
    parts = {
        name: {part: tuple(totals.get(part, 0.0) for totals in rounds) for part in PARTS}
        for name, rounds in seen.items()
    }
    whole = {
        name: tuple(sum(totals.values()) for totals in rounds) for name, rounds in seen.items()
    }
    return TrainingProfile(parts, Comparison(whole, DENSE))


class _Training:
    """A runner that is stepped from outside, and what each of its iterations cost."""

    def __init__(
        self,
        cfg: Config,
        dense: bool,
        keep_ratios: KeepRatios | None,
        reading: Callable[[], float],
    ) -> None:
        self.runner = build_runner(cfg)
        model = self.runner.model
        model = getattr(model, 'module', model)
        idle = idle_backbone(model)
        if keep_ratios is not None:
            idle.set_keep_ratios(keep_ratios)
        if dense:
            model.backbone = host_backbone(model.backbone, cfg.model.backbone)
        _prepare(self.runner)
        self.meter = Meter(reading)
        self._batches = _endless(self.runner.train_loop.dataloader)
        self._count = 0
        self._patches = ExitStack()
        self._patches.enter_context(replaced(_calls(self.runner, model), self._around))
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')

    def step(self) -> dict[str, float]:
        """Train for one iteration: ``{part: seconds}``."""
        loop, meter = self.runner.train_loop, self.meter
        meter.restart()
        meter.enter(WAITING)
        batch = next(self._batches)
        meter.leave()
        self.runner.model.train()
        if isinstance(loop, EpochBasedTrainLoop):
            loop.run_iter(self._count, batch)
        else:
            loop.run_iter(batch)
        self._count += 1
        meter.charge()
        totals = dict(meter.totals)
        totals[HOOKS_AND_REST] = totals.pop(OTHER, 0.0)
        return totals

    def close(self) -> None:
        """Undo what was replaced, and end the workers of the data loader."""
        self._patches.close()
        self._batches.close()

    def _around(self, label: Label, function: Callable[..., Any]) -> Callable[..., Any]:
        measured = self.meter.around(label, function)
        if label != BACKBONE:
            return measured

        def watched(*args: Any, **kwargs: Any) -> Any:
            return watch_gradients(measured(*args, **kwargs), self._backbone_is_next)

        return watched

    def _backbone_is_next(self) -> None:
        if self.meter.running == BACKWARD:
            self.meter.relabel(BACKWARD_BACKBONE)


def _calls(runner: Runner, model: nn.Module) -> Iterator[Call]:
    """The parts of a training iteration."""
    yield Call(PREPROCESSING, model.data_preprocessor, 'forward')
    labels = {'data_preprocessor': PREPROCESSING, 'backbone': BACKBONE, 'neck': NECK}
    for name, child in model.named_children():
        for part in [*child] if isinstance(child, nn.ModuleList) else [child]:
            label = labels.get(name, HEADS)
            for entrance in ('forward',) if name in labels else ('loss', 'forward', 'predict'):
                yield Call(label, part, entrance)
    wrapper = runner.optim_wrapper
    yield Call(OPTIMIZER, wrapper, 'update_params')
    yield Call(BACKWARD, wrapper, 'backward')


def _timing_cfg(cfg: Config, work_dir: Path, name: str, checkpoint: str | Path | None) -> Config:
    """A config that trains and does nothing besides."""
    cfg = copy.deepcopy(cfg)
    cfg.work_dir = str(work_dir / name)
    # Runners, loggers and message hubs are told apart by this name.
    cfg.experiment_name = f'{name}_{work_dir.name}'
    cfg.resume, cfg.load_from = False, None if checkpoint is None else str(checkpoint)
    if cfg.model.backbone.get('init_cfg') is not None:
        cfg.model.backbone.init_cfg = None
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.test_cfg = cfg.test_dataloader = cfg.test_evaluator = None
    cfg.log_level = 'WARNING'
    hooks = dict(cfg.get('default_hooks') or {})
    hooks.pop('visualization', None)
    cfg.default_hooks = {**hooks, 'checkpoint': None}
    cfg.custom_hooks = [
        hook for hook in cfg.get('custom_hooks') or [] if not _needs_idle(hook, name)
    ]
    return cfg


def _needs_idle(hook: Any, name: str) -> bool:
    """Whether a hook changes keep ratios, or belongs to an idle backbone while this one is not."""
    kind = hook.get('type') if isinstance(hook, dict) else type(hook)
    cls = HOOKS.get(kind) if isinstance(kind, str) else kind
    if not isinstance(cls, type):
        return False
    ours = cls.__module__.startswith('idlevit_mm.')
    return issubclass(cls, KeepRatioHook) or (ours and name == DENSE)


def _prepare(runner: Runner) -> None:
    """Do all that ``runner.train()`` does before its first iteration."""

    def ready() -> None:
        raise _Ready

    loop = runner.build_train_loop(runner._train_loop)
    loop.run = ready  # type: ignore[method-assign]
    runner._train_loop = loop
    try:
        runner.train()
    except _Ready:
        return


def _endless(loader: Any) -> Generator[Any, None, None]:
    """The batches of a loader, epoch after epoch."""
    while True:
        yield from loader


def watch_gradients(outs: Any, callback: Callable[[], None]) -> Any:
    """Have the backward pass call back when it is done with everything behind some tensors.

    Args:
        outs: A tensor, or lists and tuples of them: what a backbone returns.
        callback: Called once the gradients of all of them are there, before those of what they
            were computed from.

    Returns:
        Aliases of the tensors, with which to go on: an output may also be the input of the
        backbone's next stage, and its own gradient is complete only behind that.
    """
    outs = _aliases(outs)
    watched = [out for out in _flat(outs) if out.requires_grad]
    if watched:
        register_multi_grad_hook(watched, lambda _: callback())
    return outs


def _flat(outs: Any) -> list[Tensor]:
    return [outs] if isinstance(outs, Tensor) else [t for out in outs for t in _flat(out)]


def _aliases(outs: Any) -> Any:
    """The same lists and tuples of tensors that are nodes of their own in the autograd graph."""
    if isinstance(outs, Tensor):
        return outs.view_as(outs)
    return type(outs)(_aliases(out) for out in outs)


def shares(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Share of each part: its median over the rounds in the sum of the medians."""
    medians = {part: Spread.of(values).median for part, values in seconds.items()}
    whole = sum(medians.values()) or 1.0
    return {part: value / whole for part, value in medians.items()}
