"""Registries of the parts a config names; backbones go to mmengine's root ``MODELS``."""

import inspect
from typing import Any

from mmengine.registry import MODELS, Registry

POLICIES = Registry('idling policy', locations=['idlevit_mm.policies'])
SCORERS = Registry('token scorer', locations=['idlevit_mm.policies'])
AUXILIARY_LOSSES = Registry('auxiliary loss', locations=['idlevit_mm.losses'])


def idle_backbones() -> list[Any]:
    """Classes of the registered backbones that state their dense twins, first come first.

    They are told by what they state, so that parts below the backbones can ask them.
    """
    return [cls for cls in dict.fromkeys(MODELS.module_dict.values()) if hasattr(cls, 'DENSE')]


def arguments_of(cls: type) -> dict[str, inspect.Parameter]:
    """Arguments of a class by name, those included that its ``**kwargs`` pass on to its bases."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        if '__init__' not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)['__init__']).parameters.values())[1:]
        for parameter in parameters:
            by_name = parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY
            if parameter.kind in by_name:
                found.setdefault(parameter.name, parameter)
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def build_from(registry: Registry, argument: str, cfg: Any, /, **kwargs: Any) -> Any:
    """Build from a name or dict; unlike ``Registry.build`` errors name the argument.

    Args:
        registry: Where the class is looked up.
        argument: Dotted name of the setting that ``cfg`` is the value of.
        cfg: Name of a class, or a dict with it as ``type`` and with arguments.
        **kwargs: Further arguments of the class, which a config cannot set.

    Raises:
        TypeError: ``cfg`` is neither, or the class does not take an argument.
        ValueError: There is no such class.
    """
    cfg = {'type': cfg} if isinstance(cfg, str) else cfg
    if not isinstance(cfg, dict) or not isinstance(cfg.get('type'), str):
        raise TypeError(f'{argument}={cfg!r} must be a name or a dict with a type')
    options = dict(cfg)
    name = options.pop('type')
    cls = registry.module_dict.get(name)
    if cls is None:
        allowed = ', '.join(sorted(registry.module_dict))
        raise ValueError(f'{argument}={name!r} is unknown; allowed: {allowed}')
    accepted = [key for key in arguments_of(cls) if key not in kwargs]
    for key in options:
        if key not in accepted:
            allowed = ', '.join(['type', *accepted])
            raise TypeError(
                f'{argument}={dict(cfg)!r} has an unknown key {key!r}; allowed: {allowed}'
            )
    return cls(**kwargs, **options)
