"""Every way of naming weights that is known: told apart by its keys, read and written.

OpenMMLab's names are in the middle: each other format is a pair of functions to and from them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..checkpoints import StateDict
from ..errors import SettingError, shortened
from . import pvt, swin, vit
from .renaming import Conversion

OPENMMLAB = 'openmmlab'


def _unchanged(state: StateDict) -> Conversion:
    return Conversion(state, [], [])


@dataclass(frozen=True)
class Format:
    """One way of naming the weights of one family.

    Attributes:
        family: ``swin``, ``pvt`` (PVT, PVTv2, Mix Transformer) or ``vit``.
        name: Whose names: ``openmmlab``, ``timm``, ``official`` or ``mmpretrain``.
        title: In words, for messages.
        matches: Whether weights have these names.
        decode: These names to OpenMMLab's.
        encode: OpenMMLab's names to these.
        place: Key under which files of this format have their weights; '' for none.
    """

    family: str
    name: str
    title: str
    matches: Callable[[StateDict], bool]
    decode: Callable[[StateDict], Conversion] = _unchanged
    encode: Callable[[StateDict], Conversion] = _unchanged
    place: str = ''

    @property
    def is_foreign(self) -> bool:
        """Whether names are others than OpenMMLab's."""
        return self.name != OPENMMLAB


FORMATS = (
    Format('swin', OPENMMLAB, 'mmdet and mmseg Swin', swin.is_ours, place='state_dict'),
    Format('swin', 'timm', 'timm swin_*', swin.is_timm, swin.from_timm, swin.to_timm),
    Format(
        family='swin',
        name='official',
        title='Swin release',
        matches=swin.is_official,
        decode=swin.from_official,
        encode=swin.to_official,
        place='model',
    ),
    Format('pvt', OPENMMLAB, 'mmdet and mmseg PVT and MiT', pvt.is_ours, place='state_dict'),
    Format('pvt', 'timm', 'timm pvt_v2_*', pvt.is_timm, pvt.from_timm, pvt.to_timm),
    Format(
        family='pvt',
        name='official',
        title='PVT or SegFormer release',
        matches=pvt.is_official,
        decode=pvt.from_official,
        encode=pvt.to_official,
    ),
    Format('vit', OPENMMLAB, 'mmseg ViT', vit.is_ours, place='state_dict'),
    Format('vit', 'timm', 'timm vit_*, deit_* or DeiT', vit.is_timm, vit.from_timm, vit.to_timm),
    Format(
        family='vit',
        name='official',
        title='LV-ViT release',
        matches=vit.is_lvvit,
        decode=vit.from_lvvit,
        encode=vit.to_official,
        place='model',
    ),
    Format(
        family='vit',
        name='mmpretrain',
        title='mmpretrain ViT',
        matches=vit.is_mmpretrain,
        decode=vit.from_mmpretrain,
        encode=vit.to_mmpretrain,
        place='state_dict',
    ),
)


def detect(state: StateDict) -> Format | None:
    """The format of a backbone's weights; None where it is unknown."""
    return next((known for known in FORMATS if known.matches(state)), None)


def format_of(family: str, name: str) -> Format:
    """The format of a family by name.

    Raises:
        SettingError: The family has no such names.
    """
    names = {known.name: known for known in FORMATS if known.family == family}
    if name not in names:
        raise SettingError(f'{name} names are not known for {family}; allowed: {", ".join(names)}')
    return names[name]


def known_format(state: StateDict, source: object) -> Format:
    """The format of a backbone's weights.

    Args:
        state: Weights of the backbone.
        source: Where they come from, for the message.

    Raises:
        SettingError: It is unknown.
    """
    found = detect(state)
    if found is None:
        raise SettingError(
            f'checkpoint {source} is of no known format: its keys begin with '
            f'{shortened(sorted(state), 3)}; allowed: '
            f'{", ".join(known.title for known in FORMATS)}'
        )
    return found
