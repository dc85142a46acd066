"""How far a run in half precision is from float32, apart from which tokens either would choose.

A backbone that idles is not continuous: rounding decides between tokens of almost the same score,
and the outputs of two correct runs differ by a third. So the tokens of one run are replayed in the
other, and its own choice is compared block by block, from the same history.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from measures import captured
from torch import Tensor, nn
from traffic import Traffic

from idlevit_mm.kernels import backend_at, site_of, use, why_not
from idlevit_mm.losses import shared_copy

# The largest error and the least share of tokens chosen as in float32. What PyTorch computes came
# to 9e-4 and 0.998 in float16, to 7e-3 and 0.996 in bfloat16.
LIMITS = {torch.float16: (3e-3, 0.99), torch.bfloat16: (2.5e-2, 0.975)}
# What the rounding of a compiler, and the few tokens that it decides, make of outputs.
_MAX_DIFFERENCE = 0.1


class Replayed(nn.Module):
    """In the place of a scorer: what was active in another run comes first.

    Args:
        scorer: The one that it replaces.
        mask: Active tokens (B, H, W) of the other run, as many in each image.

    Attributes:
        shared: Share of the active tokens that the scorer would have chosen, of a whole map.
    """

    NEEDS, learns, uses_weights = 'tokens', False, False

    def __init__(self, scorer: nn.Module, mask: Tensor) -> None:
        super().__init__()
        self.scorer, self.mask = scorer, mask.flatten(1)
        self.shared = 1.0

    def forward(self, seen: Any) -> Tensor:
        """Scores (B, N): 1 for what was active, and 0."""
        best = self.scorer(seen).topk(int(self.mask[0].sum())).indices
        self.shared = self.mask.gather(1, best).double().mean().item()
        return self.mask.to(seen.tokens.dtype)


class Difference(NamedTuple):
    """Of one run from another that replays it.

    Attributes:
        relative_error: ``relative_error`` of its maps; not a number where they hold what is none.
        shared: Share of active tokens that both would choose, mean over the blocks that choose.
    """

    relative_error: float
    shared: float

    def wrong(self, dtype: torch.dtype) -> list[str]:
        """In words what is beyond rounding to a precision."""
        largest, least = LIMITS[dtype]
        texts = []
        # Turned around, so that what is not a number is wrong.
        if not self.relative_error <= largest:
            texts.append(f'relative error {self.relative_error:.1e} > {largest:g}')
        if not self.shared >= least:
            texts.append(f'{self.shared:.4f} < {least:g} of the tokens chosen as in float32')
        return texts


def randomize(model: nn.Module) -> None:
    """Weights of which all matter, always the same on a device.

    At the start of a training branches add next to nothing, and biases and tables are zero.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(0)
    for weight in model.parameters():
        spread = 0.1 if weight.ndim == 1 else weight[0].numel() ** -0.5
        nn.init.normal_(weight, float(weight.ndim == 1), spread, generator)


def relative_error(outs: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """Norm of the difference / norm of what is wanted, of the map where it is largest."""
    pairs = [
        (out.detach().double(), want.detach().double())
        for out, want in zip(outs, wanted, strict=True)
    ]
    errors = [(out - want).norm() / want.norm() for out, want in pairs]
    # Python's max() would pass over what is not a number.
    return float(torch.stack(errors).max())


def maps_alone(_: nn.Module, outs: Sequence[Tensor]) -> Sequence[Tensor]:
    """Maps as they are; see ``all_gradients``."""
    return outs


def all_gradients(model: nn.Module, outs: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of all parameters in one vector, of a random sum of maps; it is the only one."""
    generator = torch.Generator(outs[0].device).manual_seed(0)
    loss: Any = 0.0
    for out in outs:
        loss += (out * torch.randn(out.shape, generator=generator, device=out.device)).sum()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    grads = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
    return [torch.cat([grad.flatten() for grad in grads])]


def difference(
    found: Sequence[Tensor],
    masks: Sequence[Sequence[Tensor]],
    model: nn.Module,
    images: Tensor,
    of: Callable[[nn.Module, Sequence[Tensor]], Sequence[Tensor]] = maps_alone,
) -> Difference:
    """What a run on images (B, 3, H, W) came to, against the same tokens through another model.

    Args:
        found: Maps of the run, or what else is made of them.
        masks: Its ``keep_masks``.
        model: An idle backbone of the same architecture and keep ratios, such as in float32, with
            the scope 'map'.
        images: Of the run, in the precision of the model.
        of: Makes of a model and its maps what is found.
    """
    model = shared_copy(model)
    replays = []
    for blocks, chosen in zip(model.idle_blocks, masks, strict=True):
        for block, mask in zip(blocks, chosen, strict=True):
            if not mask.all():
                block.policy.scorer = Replayed(block.policy.scorer, mask)
                replays.append(block.policy.scorer)
    error = relative_error(found, of(model, model(images)))
    shared = sum(replay.shared for replay in replays) / len(replays) if replays else 1.0
    return Difference(error, shared)


def against_float32(
    model: nn.Module, images: Tensor, backend: str | None = None, gradients: bool = False
) -> tuple[dict[str, Any], list[str]]:
    """Compare an idle backbone in half precision, which becomes float32, with what it is there.

    Args:
        model: The backbone, with the scope 'map'.
        images: (B, 3, H, W) in the same precision.
        backend: The one to be taken; None for the one that is taken by itself.
        gradients: Of a step of training compare the gradients of all parameters: weights are in
            float32, and layers under autocast in the precision of the images.

    Returns:
        The backend, why it is not Triton, how many operators of this package ran, and the
        difference, with ``plain_`` that of the reference backend in the same precision; and in
        words what is wrong.
    """
    dtype, of = images.dtype, all_gradients if gradients else maps_alone
    if gradients:
        model, images = model.float(), images.float()
    runs = []
    with torch.set_grad_enabled(gradients):
        for wanted in (backend, 'reference'):
            with use(wanted) if wanted else nullcontext(), Traffic() as counted:
                with torch.autocast(images.device.type, dtype, enabled=gradients):
                    taken, reasons = backend_at(images).name, why_not(site_of(images))
                    outs = model(images)
                found = of(model, outs)
            about = dict(backend=taken, why_not=reasons.get('triton'), kernels=counted.kernels)
            runs.append((about, found, model.keep_masks))
        whole, images = model.float(), images.float()
        # A convolution in TF32 is no better than one in half precision.
        with use('reference'), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            own, plain = (difference(found, masks, whole, images, of) for _, found, masks in runs)
    about, wrong = runs[0][0], own.wrong(dtype)
    if about['backend'] == 'triton' and not about['kernels']:
        wrong.append('Triton is taken, but none of its kernels ran')
    of_plain = {f'plain_{name}': value for name, value in plain._asdict().items()}
    return about | own._asdict() | of_plain, wrong


def checked_call(model: nn.Module, images: Tensor, mode: str) -> Callable[[], Any]:
    """A forward pass ``eager``, ``compiled`` or ``captured``, which has given what eager code does.

    Raises:
        RuntimeError: It has not.
    """
    called = torch.compile(model, dynamic=False) if mode == 'compiled' else model
    call: Callable[[], Any] = partial(called, images)
    if mode == 'captured':
        call = captured(call)
    error = relative_error(call(), model(images))
    if not error <= _MAX_DIFFERENCE:
        raise RuntimeError(f'outputs {mode} differ by {error:.1e} from eager ones')
    return call
