"""How a loss looks into a model's forward pass without changing the model."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

from torch import nn

from ..errors import SettingError


class Call(NamedTuple):
    """Arguments of one call of a module, and what it returned."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any


@dataclass
class Step:
    """One forward pass in training.

    Attributes:
        model: The student, without wrappers.
        backbones: Its idle backbones by their name in the model.
        inputs: The preprocessed images, as the model's ``loss`` got them.
        calls: Last call in this pass of each module that a loss asked for, by name.
        samples: What is known of each image, as the model's ``loss`` got it.
    """

    model: nn.Module
    backbones: Mapping[str, Any]
    inputs: Any
    calls: Mapping[str, Call]
    samples: Any = None


def last_norm(backbone: Any, name: str, user: str) -> str:
    """Name of the norm whose one call has map, class token and registers of the last block.

    Raises:
        SettingError: The backbone of this name, which ``user`` looks into, has none.
    """
    last = len(backbone.idle_blocks[-1]) - 1
    has_class = len(backbone.idle_blocks) == 1 and backbone.idle_blocks[0][0].num_class
    if not (has_class and backbone.final_norm and last in backbone.out_indices):
        raise SettingError(
            f'{user} needs the class token after the last norm, which {name} has not; allowed: '
            'IdleVisionTransformer with with_cls_token=True and final_norm=True whose outputs hold '
            "the last block's"
        )
    return f'{name}.ln1'


@contextmanager
def captured(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, Call]]:
    """Note the last call of each module while the context is open.

    Forward hooks would miss heads whose ``forward`` is called directly, as mmseg does, so the
    method is wrapped on the instance and put back at the end. Calls have the names of ``modules``.
    """
    calls: dict[str, Call] = {}

    def noting(name: str, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        calls[name] = Call(args, kwargs, output)
        return output

    with ExitStack() as stack:
        for name, module in modules.items():
            patched = partial(noting, name, module.forward)
            stack.enter_context(mock.patch.object(module, 'forward', patched))
        yield calls
