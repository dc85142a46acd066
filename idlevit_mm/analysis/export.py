"""Models as graphs that other runtimes read: writing, running and comparing them.

Shape letters: B images, H and W of a stage's map in tokens.
"""

from __future__ import annotations

import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import mmcv
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..errors import UsageError, one_line
from ..losses import shared_copy
from .models import idle_backbone, noise_image

Run = Callable[[Tensor], list[Tensor]]

# Of ONNX's operators; what torch's exporter writes without converting.
OPSET = 18
# What each kind of file is, and the packages that write and read it.
TARGETS: dict[str, tuple[str, tuple[str, ...]]] = {
    '.pt2': ('torch.export', ()),
    '.onnx': (f'ONNX opset {OPSET}', ('onnx', 'onnxscript', 'onnxruntime')),
    '.xml': ('OpenVINO', ('openvino',)),
}
# TensorRT's largest K of a TopK.
TENSORRT_K = 3840
# Largest difference where the same tokens are kept, relative to the largest value of an output.
TOLERANCE = 1e-3
# Rounding decides between tokens whose scores are nearly equal: so many of all may be others, and
# outputs then differ by so much in the root of the mean square.
OTHER_TOKENS, OTHER_OUTPUTS = 1e-2, 5e-2
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class Graph(nn.Module):
    """A model as a function of images alone, whose outputs are a tuple of tensors.

    Args:
        model: A backbone; a detector or segmentor, which is run in tensor mode.
        with_masks: Whether keep masks follow.
    """

    def __init__(self, model: nn.Module, with_masks: bool = False) -> None:
        super().__init__()
        self.model = model
        self.with_masks = with_masks

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Outputs of images (B, 3, height, width), then the masks."""
        outputs = [out for out in tree_leaves(self.model(images)) if isinstance(out, Tensor)]
        return (*outputs, *self.masks()) if self.with_masks else tuple(outputs)

    def masks(self) -> list[Tensor]:
        """Keep masks of the last images, (B, H, W) for each block that idled."""
        return [
            record.keep_mask(index)
            for record in idle_backbone(self.model).records
            for index, plan in enumerate(record.plans)
            if plan.rows is not None
        ]


class Row(NamedTuple):
    """How the outputs of a graph differ from those of eager PyTorch, for one batch.

    Attributes:
        images: Which images.
        batch: How many.
        largest: Largest difference, relative to the largest value of the output.
        typical: Root of the mean square of differences, relative to that of the output.
        others: Share of tokens that only one of both keeps; None where no block idles.
        refused: Why the runtime takes no such batch; '' where it does.
    """

    images: str
    batch: int
    largest: float = 0.0
    typical: float = 0.0
    others: float | None = None
    refused: str = ''

    @property
    def is_right(self) -> bool:
        """Whether the graph does what eager PyTorch does, but for rounding."""
        if self.refused or self.largest <= TOLERANCE:
            return not self.others or self.others <= OTHER_TOKENS
        return 0.0 < (self.others or 0.0) <= OTHER_TOKENS and self.typical <= OTHER_OUTPUTS


def check_target(path: Path) -> None:
    """Raise a UsageError where such files are not written, or a package for them is missing."""
    if path.suffix not in TARGETS:
        raise UsageError(f'{path} must end in {", ".join(TARGETS)}')
    missing = [name for name in TARGETS[path.suffix][1] if importlib.util.find_spec(name) is None]
    if missing:
        raise UsageError(
            f'{path} needs {", ".join(missing)}, which is not installed: '
            'pip install "idlevit_mm[export]"'
        )


def fixed(model: nn.Module, shape: tuple[int, int]) -> nn.Module:
    """A copy of a model for images of one size in pixels, with position tables of that size.

    Raises:
        UsageError: The model takes no images of that size.
    """
    clone = shared_copy(model).eval()
    backbone, name = idle_backbone(clone), type(idle_backbone(clone)).__name__
    try:
        with torch.no_grad():
            backbone(noise_image(shape, model=backbone))
    except (RuntimeError, ValueError, AssertionError) as error:
        size = f'{shape[0]}x{shape[1]}'
        raise UsageError(f'{name} takes no images of {size}: {one_line(error)}') from error
    holders = [part for part in backbone.modules() if hasattr(part, 'fold_table')]
    # A table for each stage, or one for the first.
    for holder, record in zip(holders, backbone.records, strict=False):
        holder.fold_table(record.hw_shape)
    return clone


def record_graph(graph: Graph, images: Tensor, dynamic_batch: bool) -> torch.export.ExportedProgram:
    """Record a graph by torch.export, for the batch of the images or for any.

    Raises:
        UsageError: The model does what no graph can hold.
    """
    # One image would make all that follows from the batch a constant.
    example = images[:1].expand(2, -1, -1, -1) if dynamic_batch else images
    shapes = ({0: torch.export.Dim('batch')},) if dynamic_batch else None
    name = type(graph.model).__name__
    try:
        with torch.no_grad(), _quiet():
            return torch.export.export(
                graph, (example.contiguous(),), dynamic_shapes=shapes, strict=False
            )
    except Exception as error:
        raise UsageError(f'torch.export cannot record {name}: {_reason(error)}') from error


def save_graph(program: torch.export.ExportedProgram, path: Path) -> None:
    """Write a graph in the format that the file's name asks for.

    Raises:
        UsageError: The target lacks an operator, or the file cannot be written.
    """
    target = TARGETS[path.suffix][0]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with torch.no_grad(), _quiet():
            if path.suffix == '.pt2':
                torch.export.save(program, path)
            elif path.suffix == '.onnx':
                written = torch.onnx.export(
                    program, dynamo=True, opset_version=OPSET, input_names=['images'], verbose=False
                )
                assert written is not None
                written.save(path)
            else:
                import openvino

                model = openvino.convert_model(program)
                # Left alone it would take any size, and be wrong.
                shape = list(program.example_inputs[0][0].shape)
                if program.range_constraints:
                    shape[0] = -1
                model.reshape(shape)
                model.inputs[0].get_tensor().set_names({'images'})
                openvino.save_model(model, path, compress_to_fp16=False)
    except OSError as error:
        raise UsageError(f'{path} cannot be written: {error.strerror or error}') from error
    except Exception as error:
        raise UsageError(f'{target} cannot express this model: {_reason(error)}') from error


def runtimes(path: Path) -> dict[str, Run]:
    """What runs a file here, by name: images (B, 3, height, width) to outputs, in float32.

    OpenVINO reads ONNX files too.
    """
    found: dict[str, Run] = {}
    if path.suffix == '.pt2':
        with _quiet():
            module = torch.export.load(path).module()
        found['torch'] = lambda images: list(module(images))
    if path.suffix == '.onnx':
        found['onnxruntime'] = _onnxruntime(path)
    if path.suffix == '.xml' or (path.suffix == '.onnx' and importlib.util.find_spec('openvino')):
        found['openvino'] = _openvino(path)
    return found


def _onnxruntime(path: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what fails is raised as well
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images: [
        torch.from_numpy(out) for out in session.run(None, {name: images.numpy()})
    ]


def _openvino(path: Path) -> Run:
    import openvino

    # On processors that can, the default is bfloat16, in which other tokens are kept.
    options = dict(
        INFERENCE_PRECISION_HINT='f32',
        PERFORMANCE_HINT='LATENCY',
        INFERENCE_NUM_THREADS=torch.get_num_threads(),
    )
    model = openvino.Core().compile_model(path, 'CPU', options)
    return lambda images: [torch.from_numpy(out.copy()) for out in model(images.numpy()).values()]


def compare_graphs(
    graph: Graph, run: Run, run_masks: Run | None, batches: dict[str, Tensor]
) -> list[Row]:
    """Compare what a runtime makes of images with eager PyTorch.

    Args:
        graph: The model, with masks.
        run: The graph that is shipped.
        run_masks: The same graph with keep masks; None where no block idles.
        batches: Images (B, 3, height, width) by a name.
    """
    rows = []
    for name, images in batches.items():
        with torch.no_grad():
            want = graph(images)
        try:
            outputs = run(images)
            masks = [] if run_masks is None else run_masks(images)[len(outputs) :]
        except Exception as error:
            rows.append(Row(name, len(images), refused=one_line(error, 160)))
            continue
        pairs = [(out.double(), to.double()) for out, to in zip(outputs, want, strict=False)]
        if any(out.shape != to.shape for out, to in pairs):
            rows.append(Row(name, len(images), float('inf'), float('inf')))
            continue
        differences = [(out - to, to) for out, to in pairs]
        largest = max(float(off.abs().max() / _positive(to.abs().max())) for off, to in differences)
        typical = max(float(off.norm() / _positive(to.norm())) for off, to in differences)
        others = [
            (mask.bool() != to).sum().item() / to.numel()
            for mask, to in zip(masks, want[len(outputs) :], strict=True)
        ]
        share = sum(others) / len(others) if others else None
        rows.append(Row(name, len(images), largest, typical, share))
    return rows


def file_images(files: Sequence[str], shape: tuple[int, int], cfg: Any) -> Tensor:
    """Images of files (B, 3, height, width), resized, and normalised as a config says.

    Raises:
        UsageError: A file is no image.
    """
    preprocessor = (cfg.get('model') or {}).get('data_preprocessor') or {}
    mean, std = (
        torch.tensor(preprocessor.get(key) or default)[:, None, None]
        for key, default in (('mean', _MEAN), ('std', _STD))
    )
    order = 'rgb' if preprocessor.get('bgr_to_rgb', True) else 'bgr'
    found = []
    for file in files:
        image = mmcv.imread(file, channel_order=order) if Path(file).is_file() else None
        if image is None:
            raise UsageError(f'{file} is no image that can be read')
        pixels = torch.from_numpy(mmcv.imresize(image, shape[::-1])).permute(2, 0, 1).float()
        found.append((pixels - mean) / std)
    return torch.stack(found)


def tensorrt_note(program: torch.export.ExportedProgram, backbone: Any) -> str:
    """In a line whether TensorRT would take the rankings of a graph, and what it always takes."""
    counts = [
        node.args[1] for node in program.graph.nodes if node.target is torch.ops.aten.topk.default
    ]
    if not counts:
        return 'TensorRT: nothing is ranked'
    if not all(isinstance(count, int) for count in counts):
        return 'TensorRT: refused, its TopK wants a constant K'
    most = max(counts)
    if most <= TENSORRT_K:
        return f'TensorRT: K of every TopK is constant and at most {most} (allowed: {TENSORRT_K})'
    scopes = [scope for scope in backbone.idle_blocks[0][0].SCOPES if scope != 'map']
    remedy = 'idle only in stages of fewer tokens, or export smaller images'
    if scopes:
        remedy = f'always legal: policy.scope={" or ".join(map(repr, scopes))}'
    return f'TensorRT: refused, a TopK has K={most}, and {TENSORRT_K} is its most; {remedy}'


def _positive(x: Tensor) -> Tensor:
    return x.clamp(min=torch.finfo(x.dtype).tiny)


def _reason(error: BaseException) -> str:
    """The innermost cause, in a line: exporters wrap it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f'{type(error).__name__}: {one_line(error)}'


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters log what they tried, which is no news where they succeed."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        logging.disable(level)
