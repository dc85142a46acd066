"""Speed and multiply-adds of several models side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from idlevit_mm.analysis.cases import PARTS
from idlevit_mm.analysis.flops import backbone_multiply_adds, model_multiply_adds
from idlevit_mm.analysis.latency import Comparison, Spread, compare, realised_share
from idlevit_mm.analysis.models import blank_data_samples


@dataclass(frozen=True)
class Row:
    """Figures of one candidate.

    Attributes:
        name: what it is called in the table.
        milliseconds: per image.
        time_ratio: time divided by the reference's, round by round.
        multiply_adds: per image.
        operation_ratio: multiply-adds divided by the reference's.
    """

    name: str
    milliseconds: Spread
    time_ratio: Spread
    multiply_adds: int
    operation_ratio: float

    @property
    def realised(self) -> float | None:
        """Saved time per saved operation against the reference; None if none were saved."""
        if self.operation_ratio >= 0.995:
            return None
        return realised_share(self.time_ratio.median, self.operation_ratio)

    def as_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {**asdict(self), 'realised_share': self.realised}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Row:
        """Read what ``as_dict`` made."""
        return cls(
            record['name'],
            Spread(**record['milliseconds']),
            Spread(**record['time_ratio']),
            record['multiply_adds'],
            record['operation_ratio'],
        )


def forward_call(
    model: nn.Module, inputs: Tensor, part: str, data_samples: Sequence[Any] | None = None
) -> Callable[[], Any]:
    """A call that runs one part of a model on a batch.

    Args:
        model: a built detector or segmentor, or a bare backbone.
        inputs: (B, 3, H, W), normalised and padded.
        part: 'backbone', or 'model' for prediction with its post-processing.
        data_samples: the batch's, for 'model'; blank ones when None.

    Raises:
        ValueError: ``part`` is neither of the two.
    """
    if part == 'backbone':
        backbone = getattr(model, 'backbone', model)
        return lambda: backbone(inputs)
    if part != 'model':
        raise ValueError(f'part={part!r} must be one of {PARTS}')
    if data_samples is None:
        data_samples = blank_data_samples(model, inputs.shape)
    return lambda: model(inputs, data_samples, mode='predict')


def benchmark(
    models: Mapping[str, nn.Module],
    inputs: Tensor,
    part: str = 'backbone',
    *,
    reference: str | None = None,
    data_samples: Sequence[Any] | None = None,
    rounds: int = 30,
    warmup: int = 3,
    max_seconds: float | None = None,
) -> tuple[list[Row], Comparison]:
    """Time models in turns on one batch and count their multiply-adds.

    Args:
        models: ``{name: built model in eval mode}``.
        inputs: (B, 3, H, W), normalised and padded.
        part: 'backbone' or 'model'.
        reference: the model that ratios are formed with; the first one when None.
        data_samples: the batch's, for 'model'; blank ones when None.
        rounds: how often each model is timed.
        warmup: untimed calls of each.
        max_seconds: stop earlier when this much time has passed.

    Returns:
        One row per model, in the order given, and the times of every round.
    """
    reference = reference or next(iter(models))
    timing = compare(
        {name: forward_call(model, inputs, part, data_samples) for name, model in models.items()},
        reference=reference,
        rounds=rounds,
        warmup=warmup,
        max_seconds=max_seconds,
    )
    shape = (1, *inputs.shape[1:])
    counts = {name: multiply_adds(model, shape, part) for name, model in models.items()}
    return rows_of(timing, counts, inputs.shape[0]), timing


def multiply_adds(model: nn.Module, shape: Sequence[int], part: str) -> int:
    """Multiply-adds of one part of a model for an input shape (B, C, H, W), at inference."""
    if part == 'backbone':
        return backbone_multiply_adds(getattr(model, 'backbone', model), shape)
    return model_multiply_adds(model, shape)['total']


def rows_of(timing: Comparison, counts: Mapping[str, int], batch: int) -> list[Row]:
    """Bring times and counts of the same candidates together.

    Args:
        timing: times of whole batches.
        counts: multiply-adds per image.
        batch: images per batch.
    """
    return [
        Row(
            name,
            Spread(*(1000 * value / batch for value in asdict(timing.time(name)).values())),
            timing.ratio(name),
            counts[name],
            counts[name] / counts[timing.reference],
        )
        for name in timing.seconds
    ]
