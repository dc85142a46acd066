"""Compile the kernels of GPUs for devices that need not be there, and count what they use.

    python tests/test_kernels/compile_kernels.py [--arch 80 90]

A line for each kernel and configuration: registers, shared memory, and accesses of spilled ones, of
which there must be none. Shared memory must suffice.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from idlevit_mm.kernels.triton import (
    fusions,
    gradients,
    layers,
    ops,
    products,
    reductions,
    rows,
    selection,
    windows,
)

_TOOLS = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin'
# Arguments that are neither sizes nor of half precision.
_TYPES = dict(ids='*i64', where='*i64', offsets='*i32', places='*i32', starts='*i64')
_TYPES |= dict(known='*i32', sums='*i64')
_TYPES |= dict(changes='*i64', scores='*fp32', mean='*fp32', eps='fp32', scale='fp32', lse='*fp32')
_TYPES |= dict(grad_pairs='*fp32', grad_blank='*fp32', means='*fp32', total='i32')
_TYPES |= dict.fromkeys(('N', 'K', 'R', 'H', 'W', 'HP', 'WP', 'HIGH', 'WIDE', 'windows'), 'i32')
# What a program may have: others of 8.x have less than sm_80, and run what is compiled like it.
_MOST_SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
_CHANNELS = (64, 96, 128, 192, 320, 384, 512, 768)


def configurations() -> Iterator[tuple[Any, dict[str, Any]]]:
    """Kernels with what they are compiled with, as the operators launch them."""
    for channels in _CHANNELS:
        padded = triton.next_power_of_2(channels)
        tiles = dict(C=channels, P=padded, BLOCK=max(4096 // padded, 1))
        yield rows.sum_kernel, dict(tiles, STEPS=8)
        for norm in (False, True):
            yield rows.look_kernel, dict(tiles, DISTANCE=True, NORM=norm)
        for gather, add, norm, turned in ((1, 0, 1, 0), (1, 1, 0, 0), (0, 0, 1, 1)):
            flags = dict(GATHER=gather, ADD=add, NORM=norm, TURNED=turned)
            yield rows.rows_kernel, tiles | {name: bool(flag) for name, flag in flags.items()}
        for copy, idle, active, add in ((0, 0, 1, 1), (1, 1, 1, 1), (1, 1, 0, 0), (1, 0, 1, 0)):
            flags = dict(COPY=copy, IDLE=idle, ACTIVE=active, ADD=add, COUNT=not copy)
            yield rows.put_kernel, tiles | {name: bool(flag) for name, flag in flags.items()}
        yield from _products(channels)
    tiles = dict(BLOCK=8192, num_warps=16)
    yield selection.cut_kernel, tiles
    yield selection.select_kernel, dict(tiles, WS=7, SHIFT=3, SLOTS=4096)
    yield selection.pack_kernel, dict(WS=7, SHIFT=3, BLOCK=4096, num_warps=16)
    for packed in (False, True):
        constants = dict(C=512, PACKED=packed, HAS_BIAS=True)
        yield rows.convolve_kernel, constants | ops.CONVOLUTION_TILES
    for side, slots in ((7, 64), (12, 256)):
        sizes = dict(WS=side, SHIFT=side // 2, SLOTS=slots, BITS=32 + slots.bit_length())
        yield selection.select_in_windows_kernel, dict(sizes, num_warps=1)
        for shift, is_padded in ((0, False), (side // 2, True)):
            for dense in (False, True):
                layout = dict(A=3, D=32, WS=side, SHIFT=shift, PADDED=is_padded, DENSE=dense)
                yield (
                    windows.attention_kernel,
                    dict(layout, TRAINS=False, **ops.attention_tiles(dense, 32, side)),
                )
                tiles = dict(TRAINS=True, BLOCK_M=16, BLOCK_N=16, num_warps=1, num_stages=3 - dense)
                yield windows.attention_kernel, dict(layout, **tiles)
                tiles = dict(BLOCK=16, num_warps=1, num_stages=2)
                yield gradients.rows_gradient_kernel, dict(layout, **tiles)
                yield gradients.pairs_gradient_kernel, dict(layout, SLOTS=32, num_stages=1)


def _products(channels: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Those of blocks of so many channels, whatever the table of a device leaves to the library."""
    if channels <= fusions.ONE_KERNEL:
        sizes = dict(C=channels, P=triton.next_power_of_2(channels))
        for part in (4, 8):
            constants = dict(sizes, HIDDEN=part * channels, SCATTER=True, COUNT=True)
            yield products.mlp_kernel, dict(constants, **layers.MLP_TILES)
            constants = dict(sizes, SIDE=part, SCORE='distance', BIAS=True)
            yield reductions.reduce_kernel, dict(constants, **layers.CELL_TILES)
    if channels <= fusions.WIDEST:
        for gelu, outs in ((False, 3), (True, 4)):
            constants = dict(OUT=outs * channels, GATHER=not gelu, BIAS=True, GELU=gelu)
            yield products.norm_linear_kernel, constants | layers.norm_tiles(channels)
    for gelu, of, ins, outs in ((True, '', 1, 4), (False, 'residual', 1, 1), (False, 'out', 4, 1)):
        constants = dict(C=ins * channels, OUT=outs * channels, IDS=of, BIAS=True)
        constants |= dict(GELU=gelu, RESIDUAL=bool(of), COUNT=bool(of))
        yield products.linear_kernel, constants | layers.product_tiles(constants['C'], gelu)


def compiled(kernel: Any, constants: dict[str, Any], arch: int) -> Any:
    """Compile one kernel for one architecture."""
    names, constants = kernel.arg_names, dict(constants)
    defaults = dict(num_warps=4, num_stages=3)
    options = {name: constants.pop(name, value) for name, value in defaults.items()}
    types = _TYPES | dict.fromkeys(constants, 'constexpr')
    signature = {name: types.get(name, '*bf16') for name in names}
    pointers = [place for place, name in enumerate(names) if signature[name].startswith('*')]
    aligned = {(place,): [['tt.divisibility', 16]] for place in pointers}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=aligned)
    return triton.compile(source, target=GPUTarget('cuda', arch, 32), options=options)


def spent(binary: Any) -> tuple[int, int, int]:
    """Registers, bytes of shared memory, and accesses of local memory in the machine code."""
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(binary.asm['cubin'])
        file.flush()
        usage, code = (
            subprocess.run(
                [_TOOLS / tool, *flags, file.name], capture_output=True, text=True
            ).stdout
            for tool, *flags in (['cuobjdump', '--dump-resource-usage'], ['nvdisasm'])
        )
    registers = re.search(r'REG:(\d+)', usage)
    if registers is None or not code:
        raise SystemExit(f'{_TOOLS} gave no resource usage')
    return int(registers[1]), binary.metadata.shared, len(re.findall(r'\b(?:STL|LDL)\b', code))


def main(args: list[str] | None = None) -> int:
    """Compile all, and fail where anything spills, or asks for too much shared memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--arch', type=int, nargs='+', default=[80, 90], choices=_MOST_SHARED)
    spilling = 0
    for arch in parser.parse_args(args).arch:
        for kernel, constants in configurations():
            registers, shared, spills = spent(compiled(kernel, constants, arch))
            spilling += spills > 0 or shared > _MOST_SHARED[arch]
            shown = ' '.join(f'{name}={value}' for name, value in constants.items())
            used = f'{registers} registers, {shared} bytes shared, {spills} spills'
            print(f'sm_{arch} {kernel.__name__} {shown}: {used}', flush=True)
    return spilling


if __name__ == '__main__':
    raise SystemExit(main())
