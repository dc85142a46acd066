"""Every way of naming weights that is known: told apart by its keys, read and written.

OpenMMLab's names are in the middle: each other format is a pair of functions to and from them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ..checkpoints import StateDict
from ..errors import SettingError, shortened
from ..registry import idle_backbones
from .renaming import Conversion, KeyMap

OPENMMLAB = 'openmmlab'


class Names(NamedTuple):
    """The way to OpenMMLab's names and the one from them, where they are no ``KeyMap``."""

    decode: Callable[[StateDict], Conversion]
    encode: Callable[[StateDict], Conversion]


def _unchanged(state: StateDict) -> Conversion:
    return Conversion(state, [], [])


def with_keys(*keys: str) -> Callable[[StateDict], bool]:
    """What tells weights of a format: that these names are among theirs."""
    return lambda state: all(key in state for key in keys)


@dataclass(frozen=True)
class Format:
    """One way of naming the weights of one family.

    Attributes:
        family: What its backbones call themselves.
        name: Whose names: ``openmmlab``, ``timm``, ``official``, ``evovit``, ``mmpretrain``,
            ``dinov2``, ``huggingface`` or ``detectron2``.
        title: In words, for messages.
        matches: Whether weights have these names.
        names: The names, read and written.
        place: Key under which files of this format have their weights; '' for none.
        prefixed_for: Library whose class reads a backbone's weights with their prefix only.
    """

    family: str
    name: str
    title: str
    matches: Callable[[StateDict], bool]
    names: KeyMap | Names = Names(_unchanged, _unchanged)
    place: str = ''
    prefixed_for: str = ''

    @property
    def is_foreign(self) -> bool:
        """Whether names are others than OpenMMLab's."""
        return self.name != OPENMMLAB

    def decode(self, state: StateDict) -> Conversion:
        """These names to OpenMMLab's; a SettingError tells which weights have no counterpart."""
        return self.names.decode(state)

    def encode(self, state: StateDict) -> Conversion:
        """OpenMMLab's names to these; a SettingError tells which weights have no counterpart."""
        return self.names.encode(state)


def all_formats() -> tuple[Format, ...]:
    """The formats of all registered families."""
    return tuple(dict.fromkeys(known for cls in idle_backbones() for known in cls.FORMATS))


def detect(state: StateDict, family: str = '') -> Format | None:
    """The format of a backbone's weights, of a family if it may be; None where it is unknown."""
    known = sorted(all_formats(), key=lambda known: known.family != family)
    return next((one for one in known if one.matches(state)), None)


def format_of(family: str, name: str) -> Format:
    """The format of a family by name; a SettingError tells which it has."""
    names = {known.name: known for known in all_formats() if known.family == family}
    if name not in names:
        raise SettingError(f'{name} names are not known for {family}; allowed: {", ".join(names)}')
    return names[name]


def known_format(state: StateDict, source: object) -> Format:
    """The format of the weights from ``source``; a SettingError tells which are known."""
    found = detect(state)
    if found is None:
        raise SettingError(
            f'checkpoint {source} is of no known format: its keys begin with '
            f'{shortened(sorted(state), 3)}; allowed: '
            f'{", ".join(known.title for known in all_formats())}'
        )
    return found
