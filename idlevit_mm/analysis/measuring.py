"""Measure the cases of a benchmark: time, multiply-adds and memory of all candidates.

A candidate that fails, for want of memory or because it cannot be compiled, leaves its reason
instead of figures, and the others go on.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from idlevit_mm.analysis.benchmark import (
    Row,
    forward_call,
    multiply_adds,
    rows_of,
)
from idlevit_mm.analysis.candidates import DENSE_KINDS, Candidate, Label
from idlevit_mm.analysis.cases import DTYPES, Case
from idlevit_mm.analysis.latency import CandidateError, Comparison, compare, cuda_seconds
from idlevit_mm.analysis.memory import peak_memory
from idlevit_mm.analysis.models import noise_image
from idlevit_mm.errors import UsageError

# CUDA graphs are recorded in the second and third call.
_GRAPH_WARMUP = 5
_REASON_LENGTH = 160


@dataclass(frozen=True)
class Effort:
    """How thoroughly to measure.

    Attributes:
        rounds: how often each candidate is timed.
        warmup: untimed calls of each.
        max_seconds: per case; stop after the round in which it has passed, but not before three.
        memory: whether peak memory is measured on the CPU too, where it takes a call more.
    """

    rounds: int = 30
    warmup: int = 3
    max_seconds: float | None = None
    memory: bool = False

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            UsageError: fewer than one round, warm-ups below 0, or no time.
        """
        if self.rounds < 1:
            raise UsageError(f'--rounds {self.rounds}: must be at least 1')
        if self.warmup < 0:
            raise UsageError(f'--warmup {self.warmup}: must be at least 0')
        if self.max_seconds is not None and not self.max_seconds > 0:
            raise UsageError(f'--max-seconds {self.max_seconds:g}: must be above 0')


@dataclass(frozen=True)
class Entry:
    """What became of one candidate in one case.

    Attributes:
        label: which candidate.
        row: its times and multiply-adds; None if it failed.
        memory: bytes of one call at most above the level at its start; None if not measured.
        memory_ratio: the same divided by the reference's.
        error: why it failed, in one line.
    """

    label: Label
    row: Row | None = None
    memory: int | None = None
    memory_ratio: float | None = None
    error: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        row = None if self.row is None else self.row.as_dict()
        return {**asdict(self), 'row': row}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Entry:
        """Read what ``as_dict`` made."""
        row = record['row']
        return cls(
            **{
                **record,
                'label': Label(**record['label']),
                'row': None if row is None else Row.from_dict(row),
            }
        )


@dataclass(frozen=True)
class Result:
    """One measured case.

    Attributes:
        case: its conditions.
        reference: name of the candidate that all are compared with; None if all failed.
        rounds: how many rounds there were.
        entries: one for each candidate, in order.
    """

    case: Case
    reference: str | None
    rounds: int
    entries: tuple[Entry, ...]

    @property
    def failed(self) -> bool:
        """Whether a candidate has no figures."""
        return any(entry.row is None for entry in self.entries)

    def as_dict(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return {
            **self.case.as_dict(),
            'reference': self.reference,
            'rounds': self.rounds,
            'candidates': [entry.as_dict() for entry in self.entries],
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Result:
        """Read what ``as_dict`` made."""
        record = dict(record)
        entries = tuple(Entry.from_dict(entry) for entry in record.pop('candidates'))
        reference, rounds = record.pop('reference'), record.pop('rounds')
        return cls(Case.from_dict(record), reference, rounds, entries)


def measure(
    case: Case,
    candidates: Sequence[Candidate],
    effort: Effort,
    *,
    counts: dict[Any, int] | None = None,
    timer: Callable[[Callable[[], Any]], float] | None = None,
) -> Result:
    """Time all candidates of a case in turns, and count and weigh each.

    Args:
        case: the conditions.
        candidates: the reference first; if it fails, the next dense one takes its place.
        effort: how thoroughly.
        counts: multiply-adds known from cases before, which this one adds to.
        timer: calls a function and returns its seconds; CUDA events or the clock when None.

    Returns:
        One entry per candidate.
    """
    counts = {} if counts is None else counts
    device = torch.device(case.device)
    if device.type == 'cuda':
        timer = timer or cuda_seconds
        if device.index is not None:
            torch.cuda.set_device(device)
    errors: dict[str, str] = {}
    models: dict[str, nn.Module] = {}
    for candidate in candidates:
        name = candidate.label.name
        with _noting(name, errors):
            model = _placed(candidate.build(case.shape), case)
            _count(model, case, name, counts)
            models[name] = model
    with _compiler(case):
        timing, memory = _timed(case, candidates, models, effort, timer, errors)
    for model in models.values():
        model.eval()
    _clear(device)
    rows: dict[str, Row] = {}
    if timing is not None:
        own = {name: counts[_key(case, name)] for name in timing.seconds}
        rows = {row.name: row for row in rows_of(timing, own, case.batch)}
    base = memory.get(timing.reference) if timing is not None else None
    entries = []
    for candidate in candidates:
        name = candidate.label.name
        peak = memory.get(name)
        ratio = peak / base if base and peak is not None else None
        entries.append(Entry(candidate.label, rows.get(name), peak, ratio, errors.get(name)))
    if timing is None:
        return Result(case, None, 0, tuple(entries))
    rounds = len(timing.seconds[timing.reference])
    return Result(case, timing.reference, rounds, tuple(entries))


def _timed(
    case: Case,
    candidates: Sequence[Candidate],
    models: dict[str, nn.Module],
    effort: Effort,
    timer: Callable[[Callable[[], Any]], float] | None,
    errors: dict[str, str],
) -> tuple[Comparison | None, dict[str, int]]:
    """Times and peak memory of the models that do not fail; None and nothing if all do."""
    calls: dict[str, Callable[[], Any]] = {}
    for name, model in models.items():
        with _noting(name, errors):
            calls[name] = _call(model, _inputs(case), case)
    warmup = effort.warmup
    if case.compile == 'reduce-overhead':
        warmup = max(warmup, _GRAPH_WARMUP)
    while calls:
        reference = _reference(candidates, calls)
        if reference is None:
            errors |= dict.fromkeys(calls, 'there is nothing to compare with: the reference failed')
            break
        try:
            timing = compare(
                calls,
                reference=reference,
                rounds=effort.rounds,
                warmup=warmup,
                max_seconds=effort.max_seconds,
                timer=timer,
            )
        except CandidateError as failure:
            errors[failure.name] = reason(failure.__cause__ or failure)
            del calls[failure.name]
        else:
            return timing, _memory(case, calls, effort)
        # Not in the handler: there, the traceback still holds what the candidate had allocated.
        _clear(torch.device(case.device))
    return None, {}


def reason(error: BaseException) -> str:
    """Why something failed, in one line."""
    lines = str(error).strip().splitlines() or ['']
    text = f'{type(error).__name__}: {lines[0]}'.rstrip(': ')
    return text if len(text) <= _REASON_LENGTH else text[: _REASON_LENGTH - 1] + '…'


def _reference(candidates: Sequence[Candidate], calls: dict[str, Any]) -> str | None:
    """The first candidate, or the next dense one that is left."""
    for index, candidate in enumerate(candidates):
        label = candidate.label
        if label.name in calls and (index == 0 or label.kind in DENSE_KINDS):
            return label.name
    return None


@contextmanager
def _noting(name: str, errors: dict[str, str]) -> Iterator[None]:
    """Write down why a candidate fails, and go on."""
    try:
        yield
    except Exception as error:
        errors[name] = reason(error)


def _placed(model: nn.Module, case: Case) -> nn.Module:
    """The model on the device, in the mode and memory format of the case."""
    model.to(case.device)
    if case.channels_last:
        model.to(memory_format=torch.channels_last)
    model.train(case.mode == 'train')  # on a line of its own: mmdet's Swin returns None here
    return model


@functools.lru_cache(maxsize=1)
def _inputs(case: Case) -> Tensor:
    """The images, the same for all candidates."""
    inputs = noise_image(case.input_shape, case.device)
    return inputs.to(memory_format=torch.channels_last) if case.channels_last else inputs


def _key(case: Case, name: str) -> tuple[Any, ...]:
    return case.target, case.part, case.shape, name


def _count(model: nn.Module, case: Case, name: str, counts: dict[Any, int]) -> None:
    """Count multiply-adds per image, unless known."""
    key = _key(case, name)
    if key not in counts:
        counts[key] = multiply_adds(model, (1, *case.input_shape[1:]), case.part)


def _call(model: nn.Module, inputs: Tensor, case: Case) -> Callable[[], Any]:
    """One forward, or one forward and backward, under the conditions of a case."""
    if case.compile != 'none':
        model = _compiled(model, case)
    forward = forward_call(model, inputs, case.part)
    device = torch.device(case.device).type

    def run() -> Any:
        if case.compile == 'reduce-overhead':
            torch.compiler.cudagraph_mark_step_begin()
        if case.dtype == 'float32':
            return forward()
        with torch.autocast(device, DTYPES[case.dtype]):
            return forward()

    if case.mode == 'inference':
        return run
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> None:
        with torch.enable_grad():
            outputs = run()
            loss = sum(output.float().square().mean() for output in outputs)
        loss.backward()
        for parameter in parameters:
            parameter.grad = None

    return step


def _compiled(model: nn.Module, case: Case) -> nn.Module:
    """The model compiled for one shape; of a whole model its backbone."""
    mode = None if case.compile == 'default' else case.compile
    backbone: Any = torch.compile(getattr(model, 'backbone', model), mode=mode, dynamic=False)
    if case.part == 'backbone':
        return backbone
    whole = copy.copy(model)
    whole._modules = dict(model._modules)  # the model itself keeps its own backbone
    whole.backbone = backbone
    return whole


@contextmanager
def _compiler(case: Case) -> Iterator[None]:
    """Forget what was compiled before, and never fall back to eager code without a word."""
    if case.compile == 'none':
        yield
        return
    import torch._dynamo as dynamo

    limits: dict[str, Any] = dict(
        recompile_limit=256, accumulated_recompile_limit=4096, fail_on_recompile_limit_hit=True
    )
    known = {name: value for name, value in limits.items() if hasattr(dynamo.config, name)}
    dynamo.reset()
    with dynamo.config.patch(**known):
        yield
    dynamo.reset()


def _memory(case: Case, calls: dict[str, Callable[[], Any]], effort: Effort) -> dict[str, int]:
    """Peak memory of each call, in bytes; none with CUDA graphs, which keep theirs."""
    device = torch.device(case.device)
    if case.compile == 'reduce-overhead' or not (device.type == 'cuda' or effort.memory):
        return {}
    found = {}
    for name, call in calls.items():
        with contextlib.suppress(torch.cuda.OutOfMemoryError), torch.no_grad():
            found[name] = peak_memory(call, device)
    return found


def _clear(device: torch.device) -> None:
    """Give unused memory back before something else needs it."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()
