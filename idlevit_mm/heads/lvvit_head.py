"""Classifier of LV-ViT: the class token, and of each class the token that shows most of it.

Shape letters: B images, C channels, K classes, H and W rows and columns of the map.
"""

from typing import Any

from mmengine.registry import MODELS
from mmpretrain.models.heads import VisionTransformerClsHead
from torch import Tensor, nn


@MODELS.register_module()
class LVViTClsHead(VisionTransformerClsHead):
    """LV-ViT (arXiv 2104.10858) adds half of the best score of any token, idle ones too.

    The backbone is to have ``output_cls_token=True``. Arguments are those of mmpretrain's
    ``VisionTransformerClsHead``.
    """

    def _init_layers(self) -> None:
        super()._init_layers()
        self.layers.add_module('aux_head', nn.Linear(self.in_channels, self.num_classes))

    def forward(self, feats: Any) -> Tensor:
        """Scores (B, K) of the last output, a map (B, C, H, W) and class tokens (B, C)."""
        tokens = feats[-1][0].flatten(2).transpose(1, 2)
        return super().forward(feats) + 0.5 * self.layers.aux_head(tokens).amax(dim=1)
