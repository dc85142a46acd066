"""Training signals for idle backbones; ``AuxiliaryLossHook`` adds them to any model."""

from .assisted import AssistedLoss
from .base import AuxiliaryLoss, build_losses
from .capture import Step, captured
from .distill import FeatureDistillation, LogitDistillation
from .teacher import Teacher, Teachers, shared_copy
from .token_cut import TokenCutLoss
