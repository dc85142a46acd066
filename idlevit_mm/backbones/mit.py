"""Mix Transformer, the backbone of SegFormer, with idle tokens (arXiv 2105.15203, 2310.05654)."""

from collections.abc import Sequence
from typing import Any

from mmengine.registry import MODELS

from .pvt import IdlePyramidVisionTransformer


@MODELS.register_module()
class IdleMixVisionTransformer(IdlePyramidVisionTransformer):
    """Mix Transformer (MiT) of mmseg that computes only active tokens.

    It is a PVTv2 with other numbers: overlapping patches, a depth-wise convolution in the
    feed-forward network, a norm after each stage, and no position table.

    Args:
        num_heads: (1, 2, 5, 8) in the published models.
        patch_sizes: Kernel size of the patch embedding of each stage; padded by half of it.
        convert_weights: Needed for an official SegFormer release, not for mmseg's ``mit_b*.pth``.
        **kwargs: Further arguments of ``IdlePyramidVisionTransformer`` except
            ``pretrain_img_size``, ``paddings``, ``mlp_ratios``, ``use_abs_pos_embed``,
            ``norm_after_stage`` and ``use_conv_ffn``, which make the architecture.
    """

    DENSE = (('mmseg', 'MixVisionTransformer'),)

    def __init__(
        self,
        num_heads: Sequence[int] = (1, 2, 4, 8),
        patch_sizes: Sequence[int] = (7, 3, 3, 3),
        mlp_ratio: int = 4,
        drop_path_rate: float = 0.0,
        convert_weights: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            num_heads=num_heads,
            patch_sizes=patch_sizes,
            paddings=[size // 2 for size in patch_sizes],
            mlp_ratios=[mlp_ratio] * len(patch_sizes),
            drop_path_rate=drop_path_rate,
            convert_weights=convert_weights,
            use_abs_pos_embed=False,
            norm_after_stage=True,
            use_conv_ffn=True,
            **kwargs,
        )
