"""Classifiers that look at more than the class token: those of Evo-ViT and of LV-ViT.

Shape letters: B images, C channels, K classes, H and W rows and columns of the map.
"""

from typing import Any

from mmengine.registry import MODELS
from mmpretrain.models.heads import VisionTransformerClsHead
from torch import Tensor, nn


@MODELS.register_module()
class EvoViTClsHead(VisionTransformerClsHead):
    """Evo-ViT (arXiv 2108.01390) classifies by the mean of all tokens, idle ones too.

    Half of the loss is that of the class token, whose attention ranks; inference has no use for
    its classifier. Both have a norm of their own, so the backbone is to have ``final_norm=False``
    and ``output_cls_token=True``. Arguments are those of mmpretrain's ``VisionTransformerClsHead``.
    """

    def _init_layers(self) -> None:
        super()._init_layers()
        self.layers.add_module('norm', nn.LayerNorm(self.in_channels, eps=1e-6))
        self.layers.add_module('norm_cls', nn.LayerNorm(self.in_channels, eps=1e-6))
        self.layers.add_module('head_cls', nn.Linear(self.in_channels, self.num_classes))

    def pre_logits(self, feats: Any) -> Tensor:
        """What is classified, (B, C), of the last output: a map (B, C, H, W) and class tokens."""
        return self.layers.norm(feats[-1][0].mean(dim=(2, 3)))

    def loss(self, feats: Any, data_samples: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Losses of both halves by name, each weighing one half, and what else the head logs."""
        losses = super().loss(feats, data_samples, **kwargs)
        scores = self.layers.head_cls(self.layers.norm_cls(feats[-1][1]))  # (B, K)
        of_class = self._get_loss(scores, data_samples, **kwargs)['loss']
        return {**losses, 'loss': 0.5 * losses['loss'], 'loss_class_token': 0.5 * of_class}


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
