"""Which modules may be passed over by whoever has a faster way to what they compute.

A layer that somebody has replaced, hooked, pruned, parametrised, quantised or given a forward of
its own does more than its weights say: it is called as a module.
"""

from mmcv.cnn.bricks.drop import DropPath
from mmcv.cnn.bricks.scale import LayerScale
from mmcv.cnn.bricks.wrappers import Linear as WrappedLinear
from mmengine.model import Sequential
from torch import nn
from torch.nn.modules import activation
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

LINEAR = (nn.Linear, WrappedLinear, NonDynamicallyQuantizableLinear)
_KNOWN: set[type] = {
    *LINEAR,
    *(getattr(activation, name) for name in ('GELU', 'ReLU', 'SiLU', 'Hardswish', 'LeakyReLU')),
    nn.Conv2d,
    nn.Dropout,
    nn.Identity,
    nn.LayerNorm,
    nn.Sequential,
    Sequential,
    DropPath,
    LayerScale,
}


def is_plain(layer: nn.Module, *classes: type) -> bool:
    """Whether a module is exactly one of some classes, and nothing hangs on it.

    Who measures must not change what is computed: hooks of all modules at once, which counters and
    profilers set, do not matter.
    """
    return type(layer) in classes and _untouched(layer)


def all_plain(*layers: nn.Module | None) -> bool:
    """Whether modules and all their parts are plain, and of classes that treat tokens singly."""
    # Asked in every pass: ``layer.modules()`` takes five times as long.
    for layer in layers:
        if layer is None:
            continue
        if type(layer) not in _KNOWN or not _untouched(layer):
            return False
        if layer._modules and not all_plain(*layer._modules.values()):
            return False
    return True


def _untouched(layer: nn.Module) -> bool:
    own = layer.__dict__
    return not (
        own['_forward_hooks']
        or own['_forward_pre_hooks']
        or own['_backward_hooks']
        or own['_backward_pre_hooks']
        or 'forward' in own
    )


def known_plain(cls: type) -> type:
    """Class decorator: ``all_plain`` knows the class."""
    _KNOWN.add(cls)
    return cls


def kind_of(layer: object) -> str:
    """Name of a class of this package; '' for others, which may compute something else."""
    cls = type(layer)
    return cls.__name__ if cls.__module__.startswith('idlevit_mm.') else ''
