"""How fast devices work."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Pace(NamedTuple):
    """How fast a device works.

    Attributes:
        single: Multiply-adds of linear layers a second in float32, TF32 off.
        half: The same in half precision.
        pairs: Multiply-adds of attention and of depth-wise convolutions a second.
        moved: Bytes a second.
        launch: Nanoseconds for each operation.
        choice: The same for the many small ones of a choice of tokens.
    """

    single: int
    half: int
    pairs: int
    moved: int
    launch: int
    choice: int


# The CPU's is for each thread, of an AMD EPYC with AVX-512, fitted to measured blocks. The H100's,
# but for float32, is fitted to twelve passes captured as graphs. The A100's are peaks of its data
# sheet times the share that cuBLAS and copies reach, and the H100's choice at 0.8 of its clock; not
# measured.
PACES = {
    'cpu': Pace(45 * 10**9, 75 * 10**9, 32 * 10**9, 10**10, 63_000, 756_000),
    'H100': Pace(23 * 10**12, 15 * 10**13, 15 * 10**13, 28 * 10**11, 3_000, 43_000),
    'A100': Pace(7 * 10**12, 9 * 10**13, 30 * 10**12, 14 * 10**11, 3_000, 54_000),
}
# Copies use no more threads than this.
_COPIERS = 8


@torch.compiler.assume_constant_result
def pace_of(device: torch.device) -> Pace:
    """The pace of a device: of the CPU by its threads, of GPUs that are not listed an A100's."""
    if device.type == 'cpu':
        threads, one = torch.get_num_threads(), PACES['cpu']
        rates = threads * one.single, threads * one.half, threads * one.pairs
        return Pace(*rates, min(threads, _COPIERS) * one.moved, *one[4:])
    known = device.type == 'cuda' and torch.cuda.is_available()
    name = torch.cuda.get_device_name(device) if known else ''
    return PACES['H100' if any(part in name for part in ('H100', 'H200', 'B200')) else 'A100']
