"""Names of weights in mmdet, mmseg, timm, mmpretrain and the releases, in both directions."""

from .convert import TARGETS, Converted, convert_file, convert_weights
from .formats import FORMATS, OPENMMLAB, Format, detect, format_of, known_format
from .renaming import Conversion
from .tables import Fitted, fit_pvt, fit_swin, fit_vit

__all__ = [
    'FORMATS',
    'OPENMMLAB',
    'TARGETS',
    'Conversion',
    'Converted',
    'Fitted',
    'Format',
    'convert_file',
    'convert_weights',
    'detect',
    'fit_pvt',
    'fit_swin',
    'fit_vit',
    'format_of',
    'known_format',
]
