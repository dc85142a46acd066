"""Weights, gradients and optimiser state spread over all processes (FSDP).

torch has two implementations. The one that mmengine wraps (``MMFullyShardedDataParallel``) refuses
to run without an accelerator, renames parameters, so that ``paramwise_cfg`` no longer finds them,
and clips gradients by the norm of each process's share. This module uses the other one,
``torch.distributed.fsdp.fully_shard``, which has none of these faults.

A model is sharded at the last moment before the first iteration. Until then it is a whole model on
every process: drawing weights, ``load_from``, resuming, teachers and optimisers need no code of
their own. After it, state dicts are put together again, so a checkpoint is that of a whole model.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from mmengine.device import get_device
from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS, MODEL_WRAPPERS
from mmengine.utils import apply_to
from torch import Tensor, nn

from ..backbones import IdleBackbone
from ..errors import SettingError


@MODEL_WRAPPERS.register_module()
class FullyShardedModel(nn.Module):
    """A model whose weights, gradients and optimiser state are sharded while it trains.

    :class:`~idlevit_mm.engine.ResumableRunner` shards it before the first iteration. The blocks of
    idle backbones are gathered one at a time; everything else, whose use may depend on the data, is
    gathered as a whole in each iteration.

    Args:
        module: The model, which :meth:`shard` shards in place.
        units: Names of further classes whose instances are gathered one at a time. Each process
            must run each instance equally often in each iteration.
        reshard_after_forward: Whether blocks let go of their weights between the forward and the
            backward pass; False needs more memory and less communication.
    """

    def __init__(
        self, module: nn.Module, units: Iterable[str] = (), reshard_after_forward: bool = True
    ) -> None:
        super().__init__()
        self.module = module
        self.units = frozenset(units)
        self.reshard_after_forward = reshard_after_forward
        self.is_sharded = False
        if unknown := self.units - {type(part).__name__ for part in module.modules()}:
            raise ValueError(
                f'FullyShardedModel: units={sorted(self.units)} names classes that are not in '
                f'{type(module).__name__}: {sorted(unknown)}'
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    def train_step(self, data: Any, optim_wrapper: Any) -> dict[str, Tensor]:
        """One iteration of a model that is sharded: the gradients of another would stay apart."""
        if not self.is_sharded:
            raise SettingError(
                "FullyShardedModel needs runner_type='ResumableRunner', which is what "
                'tools/train.py uses for configs without runner_type'
            )
        return self.module.train_step(data, optim_wrapper)

    def val_step(self, data: Any) -> list:
        """Predictions."""
        return self.module.val_step(data)

    def test_step(self, data: Any) -> list:
        """Predictions."""
        return self.module.test_step(data)

    def shard(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Keep only this process's share of the weights and of the optimisers' state.

        Raises:
            SettingError: torch is older than 2.6, or the model has parameters without dimension.
        """
        if self.is_sharded:
            return
        try:
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
        except ImportError as error:
            raise SettingError(
                f'FullyShardedModel needs torch >= 2.6, and this is {torch.__version__}; train '
                'with DDP by leaving model_wrapper_cfg out'
            ) from error
        before = dict(self.module.named_parameters())
        if scalars := [name for name, parameter in before.items() if parameter.dim() == 0]:
            raise SettingError(
                f'FullyShardedModel cannot shard parameters without dimension, such as '
                f'{scalars[0]}; train with DDP by leaving model_wrapper_cfg out'
            )
        mesh = torch.distributed.init_device_mesh(get_device(), (get_world_size(),))
        for part in [*self._parts(), self.module]:
            fully_shard(part, mesh=mesh, reshard_after_forward=self.reshard_after_forward)
            if hasattr(part, 'kept_share'):  # losses call it, and it needs the block's weights too
                register_fsdp_forward_method(part, 'kept_share')
        after = dict(self.module.named_parameters())
        shards = {before[name]: after[name] for name in before}
        for optimizer in optimizers:
            _shard_optimizer(optimizer, shards)
            optimizer.register_state_dict_post_hook(_gather_optimizer)
        self.module.register_state_dict_post_hook(_gather_model)
        self.is_sharded = True

    def _parts(self) -> list[nn.Module]:
        """What is gathered on its own, the innermost first, as ``fully_shard`` wants it."""
        inner = list(self.module.modules())[1:]
        backbones = [part for part in self.module.modules() if isinstance(part, IdleBackbone)]
        blocks = {block for one in backbones for stage in one.idle_blocks for block in stage}
        chosen = [part for part in inner if part in blocks or type(part).__name__ in self.units]
        return [part for part in reversed(chosen) if next(part.parameters(), None) is not None]


@HOOKS.register_module()
class ShardHook(Hook):
    """Shards a :class:`FullyShardedModel` when everything else is ready to train.

    ``ResumableRunner`` adds it. After all other hooks: they may copy the model or its weights.
    """

    priority = 'LOWEST'

    def before_train(self, runner: Any) -> None:
        """Shard the model and its optimisers.

        Raises:
            SettingError: The model cannot be sharded, or a hook needs it whole.
        """
        if any(isinstance(hook, EMAHook) for hook in runner.hooks):
            raise SettingError(
                'EMAHook averages a whole model, which FullyShardedModel does not keep; train '
                'with DDP by leaving model_wrapper_cfg out'
            )
        runner.model.shard(optimizers_of(runner.optim_wrapper))


def optimizers_of(optim_wrapper: Any) -> list[torch.optim.Optimizer]:
    """The optimisers of an ``OptimWrapper`` or an ``OptimWrapperDict``."""
    wrappers = getattr(optim_wrapper, 'optim_wrappers', None)
    return [part.optimizer for part in (wrappers.values() if wrappers else (optim_wrapper,))]


def _shard_optimizer(optimizer: torch.optim.Optimizer, shards: dict[Tensor, Any]) -> None:
    """Let an optimiser update shards instead of whole parameters, with its state so far."""
    for group in optimizer.param_groups:
        group['params'] = [shards.get(parameter, parameter) for parameter in group['params']]
    for parameter, shard in shards.items():
        if parameter in optimizer.state:
            entries = optimizer.state.pop(parameter).items()
            optimizer.state[shard] = {name: _like(old, parameter, shard) for name, old in entries}


def _like(value: Any, parameter: Tensor, shard: Any) -> Any:
    """Shard a tensor of the state as its parameter is; counters and others stay as they are."""
    if not isinstance(value, Tensor) or value.shape != parameter.shape:
        return value
    return torch.distributed.tensor.distribute_tensor(value, shard.device_mesh, shard.placements)


def _gathered(state: Any) -> Any:
    """Put the sharded tensors of a state together, on the CPU of the main process; collective."""
    return apply_to(
        state, lambda value: isinstance(value, torch.distributed.tensor.DTensor), _whole
    )


def _whole(shard: Any) -> Tensor:
    whole = shard.detach().full_tensor()
    # The others keep nothing: a whole model may be more than their memory holds.
    return whole.cpu() if is_main_process() else whole.new_empty(0)


def _gather_model(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    state.update(_gathered(dict(state)))


def _gather_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    return _gathered(state)
