# SPDX-License-Identifier: Apache-2.0
"""Matrices that a warp loads, stores and multiplies: "Warp-Level Matrix Instructions" of the PTX ISA.

A product is exact and rounded once, where a chip's tensor cores cut off some low bits.
"""

import numpy as np

from .arithmetic import f4, i8, operand_of_product, u2, u4
from .translate import address, destination, instruction, source, vector

# --- fragments: which element each thread of a warp holds in which register ------------------------------------------


def a_fragment(registers, kind):
    """(warps, 16, k) of registers with 16 rows each: 2 elements of 16 bits a register, or one of tf32."""
    per = 1 if kind == "tf32" else 2
    bits = np.stack(registers).view(u4 if per == 1 else u2).reshape(len(registers) // 2, 2, -1, 8, 4, per)
    return operand_of_product(bits.transpose(2, 1, 3, 0, 4, 5), kind).reshape(bits.shape[2], 16, -1)


def b_fragment(registers, kind):
    """(warps, k, 8)."""
    per = 1 if kind == "tf32" else 2
    bits = np.stack(registers).view(u4 if per == 1 else u2).reshape(len(registers), -1, 8, 4, per)
    return operand_of_product(bits.transpose(1, 0, 3, 4, 2), kind).reshape(bits.shape[1], -1, 8)


def accumulators(registers):
    """(warps, 16, n) of fp32."""
    numbers = np.stack(registers).view(f4).reshape(len(registers) // 4, 2, 2, -1, 8, 4)
    return numbers.transpose(3, 1, 4, 0, 5, 2).reshape(numbers.shape[3], 16, -1)


def registers_of(numbers):
    """The registers of such accumulators."""
    warps, _, n = numbers.shape
    bits = numbers.reshape(warps, 2, 8, n // 8, 4, 2).transpose(3, 1, 5, 0, 2, 4).reshape(n // 2, -1)
    return np.ascontiguousarray(bits).view(u4)


def product(a, b, c):
    return (np.matmul(a, b) + c).astype(f4)


# --- instructions of a warp ------------------------------------------------------------------------------------------


def _rows(batch, own, mask, read, count):
    """(lanes, addresses) of the rows of matrices: 8 threads name those of the first, 8 more those of the second."""
    warps = batch.whole_warps(mask, own.line)
    lanes = (warps[:, None] * 32 + np.arange(8 * count)).reshape(-1)
    return warps, lanes, batch.full(read(batch)).astype(i8)[lanes]


MATRICES = r"matrix\.sync\.aligned\.m8n8\.x[124](\.trans)?\.shared(::cta)?\.b16"


def _matrices(own, registers):
    """Whether they are transposed."""
    if f"x{len(registers)}" not in own.parts:
        raise own.unknown()
    return own.has("trans")


@instruction("ldmatrix", form="ld" + MATRICES)
def ldmatrix(program, own):
    results = vector(own.operands[0])
    transposed = _matrices(own, results)
    read, writes = address(program, own.operands[1]), [destination(program, name, "b32") for name in results]

    def run(batch, mask):
        warps, lanes, at = _rows(batch, own, mask, read, len(writes))
        matrices = batch.shared.read(lanes, at, 16, own.line, "ldmatrix").view(u2).reshape(-1, len(writes), 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        found = np.zeros((len(writes), batch.lanes // 32, 32), u4)
        found[:, warps] = np.ascontiguousarray(matrices).view(u4).reshape(-1, len(writes), 32).swapaxes(0, 1)
        for write, registers in zip(writes, found, strict=True):
            write(batch, registers.reshape(-1), mask)

    return run


@instruction("stmatrix", form="st" + MATRICES)
def stmatrix(program, own):
    values = vector(own.operands[1])
    transposed = _matrices(own, values)
    find, reads = address(program, own.operands[0]), [source(program, name, "b32") for name in values]

    def run(batch, mask):
        warps, lanes, at = _rows(batch, own, mask, find, len(reads))
        matrices = np.stack([batch.by_warp(read(batch))[warps] for read in reads], axis=1)
        matrices = np.ascontiguousarray(matrices).view(u2).reshape(-1, len(reads), 8, 8)
        if transposed:
            matrices = np.ascontiguousarray(matrices.swapaxes(2, 3))
        batch.shared.write(lanes, at, matrices.reshape(-1, 8).view(u4), own.line, "stmatrix")

    return run


@instruction("mma", form=r"mma\.sync\.aligned\.m16n8k(8|16)\.row\.col\.f32\.(b?f16|tf32)\.\2\.f32")
def mma(program, own):
    kind = own.parts[-2]
    a, b, c = ([source(program, name, "b32") for name in operand] for operand in own.operands[1:])
    writes = [destination(program, name, "b32") for name in own.operands[0]]

    def run(batch, mask):
        batch.whole_warps(mask, own.line)
        x, y, z = ([batch.full(read(batch)) for read in registers] for registers in (a, b, c))
        new = product(a_fragment(x, kind), b_fragment(y, kind), accumulators(z))
        for write, registers in zip(writes, registers_of(new), strict=True):
            write(batch, registers, mask)

    return run
