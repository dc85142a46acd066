"""Policies decide which units of a block are active and what the idle ones receive.

Scorers rank the tokens for them.
"""

from .evit import EViT
from .evovit import EvoViT
from .idlevit import IdleViT
from .plan import EVERYTHING, Plan, Regroup
from .policy import Policy, build_policy
from .schedule import KeepRatios, checked_ratio, normalize_keep_ratios
from .scorers import ActivationNorm, ClassAttention, ClassQuery, Learned, MeanDistance, Scorer, Seen
from .select import select_units, unit_scores
from .sparsevit import SparseViT
