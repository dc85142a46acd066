"""Names of weights in mmdet, mmseg, timm, mmpretrain and the releases, in both directions."""

from .convert import TARGETS, Converted, convert_file, convert_weights
from .formats import OPENMMLAB, Format, all_formats, detect, format_of, known_format
from .renaming import Conversion
from .tables import Fitted, Size, fit_tables, in_tokens
