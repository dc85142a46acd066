from .active_tokens import ActiveTokensVisualizationHook
from .atomic_checkpoint import AtomicCheckpointHook
from .auxiliary_loss import AuxiliaryLossHook, add_losses
from .exact_resume import ExactResumeHook
from .keep_ratio import KeepRatioWarmupHook, RandomKeepRatioHook
from .orderly_end import OrderlyEndHook
from .stage_wise import StageWiseHook
