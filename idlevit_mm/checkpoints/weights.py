"""The weights of a checkpoint that has been read: where they lie and whose they are."""

from typing import Any

from torch import Tensor

StateDict = dict[str, Tensor]

# Where projects put their weights: OpenMMLab and timm, the releases of Swin and DeiT, DeepSpeed.
PLACES = ('state_dict', 'model', 'module')
WRAPPER = 'module.'
BACKBONE = 'backbone.'
# Ends of names of buffers that follow from the window: made anew, whatever a checkpoint has.
FOLLOWING = '.relative_position_index', '.relative_coords_table'
# The pace of a device, with idle_where='pays': no checkpoint needs it, any may have it.
PACE = 'payer.rates'
# What pre-training (SimMIM, DINO and others) and trainers put before the names of a backbone.
_AROUND = ('encoder.', 'student.', 'model.', 'dinov2.', 'dinov2_with_registers.')
# Where Hugging Face's networks have their blocks; their embeddings are no part of `encoder`.
_BLOCKS = 'encoder.layer.'


def place_of_weights(checkpoint: dict[str, Any]) -> str:
    """The key under which a checkpoint has its weights; '' where it is a state dict itself."""
    return next((key for key in PLACES if isinstance(checkpoint.get(key), dict)), '')


def weights_of(checkpoint: Any) -> StateDict:
    """The tensors of a checkpoint by name; none where it has no weights."""
    if not isinstance(checkpoint, dict):
        return {}
    place = place_of_weights(checkpoint)
    weights = checkpoint[place] if place else checkpoint
    return {
        str(name): value
        for name, value in weights.items()
        if isinstance(name, (str, int)) and isinstance(value, Tensor)
    }


def unwrapped(weights: StateDict) -> StateDict:
    """Names without what wrappers for several processes put before them."""
    return {name.removeprefix(WRAPPER): value for name, value in weights.items()}


def split_backbone(weights: StateDict) -> tuple[StateDict, StateDict]:
    """The backbone of a detector, segmentor or pre-training, its prefix removed, and the rest.

    Weights of which no name has such a prefix are those of a backbone alone.
    """
    if any(name.startswith(_BLOCKS) for name in weights):
        return weights, {}
    for prefix in (BACKBONE, *_AROUND):
        inside = {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}
        if inside:
            others = {n: v for n, v in weights.items() if not n.startswith(prefix)}
            backbone, more = split_backbone(inside)
            return backbone, {**others, **more}
    return weights, {}
