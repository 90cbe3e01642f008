"""Matrices that warps and warpgroups load, store and multiply.

PTX ISA, "Warp-Level Matrix Instructions" (ldmatrix, stmatrix, mma) and "Asynchronous Warpgroup Level Matrix
Instructions" (wgmma). A product is exact and rounded once, where a chip's tensor cores cut off some low bits.
"""

import re
from dataclasses import dataclass

import numpy as np

from .arithmetic import POISON, f4, f8, i8, operand_of_product, u2, u4, u8
from .groups import Groups
from .memory import swizzled
from .races import BY_COPIES, BY_THREADS, PENDING
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


# --- instructions of a warpgroup -------------------------------------------------------------------------------------

SWIZZLES = {0: 0, 1: 128, 2: 64, 3: 32}  # bytes of a row, by the two highest bits of a descriptor


@dataclass
class Operand:
    """Registers of A, or a matrix in shared memory that a descriptor finds."""

    rows: int
    kind: str
    transposed: bool = False  # k is not the contiguous dimension
    registers: tuple = ()  # their indices
    values: tuple = ()
    descriptor: np.ndarray | None = None  # for each warpgroup
    line: int = 0

    def addresses(self, groups):
        """(warpgroups, rows or k, units of 16 bytes): "Shared Memory Matrix Layout" and "Matrix Descriptor Format"."""
        own = self.descriptor[groups][:, None, None]
        start, leading, stride = (((own >> u8(place)) & u8(0x3FFF)).astype(i8) << 4 for place in (0, 16, 32))
        modes = np.unique(own >> u8(62))
        if len(modes) > 1 or ((own >> u8(49)) & u8(7)).any():
            raise NotImplementedError("descriptors of two kinds, or with a base offset")
        row = SWIZZLES[int(modes[0])]
        if not self.transposed:
            r, unit = np.arange(self.rows)[:, None], np.arange(2)
            at = start + r // 8 * stride + (r % 8 * row + unit * 16 if row else r % 8 * 16 + unit * leading)
        else:
            k, unit = np.arange(16)[:, None], np.arange(self.rows // 8)
            if row:
                at = start + unit // (row // 16) * leading + unit % (row // 16) * 16 + k // 8 * stride + k % 8 * row
            else:
                at = start + unit * stride + k // 8 * leading + k % 8 * 16
        return swizzled(at, row)

    def numbers(self, batch, groups):
        """(warpgroups, rows, k)."""
        if self.descriptor is None:
            values = [batch.full(value) for value in self.values]
            return a_fragment(values, self.kind).reshape(batch.lanes // 128, 64, -1)[groups]
        at = self.addresses(groups)
        lanes = np.broadcast_to(groups[:, None, None] * 128, at.shape)
        batch.shared.check(at.reshape(-1), 16, self.line, "wgmma")
        units = batch.shared.rows.read(at + batch.shared.base[lanes], 16)
        bits = units.view(u4 if self.kind == "tf32" else u2).reshape(*at.shape[:2], -1)
        numbers = operand_of_product(bits, self.kind)
        return numbers.swapaxes(1, 2) if self.transposed else numbers


@dataclass
class Product:
    to: tuple  # indices of the registers of the accumulators
    a: Operand
    b: Operand
    keeps: np.ndarray  # of each warpgroup, whether it adds to what is there
    line: int


class Products:
    """The products that the warpgroups of a batch have in flight. They run when they are waited for."""

    def __init__(self, batch):
        self.batch = batch
        self.groups = Groups(batch.lanes // 128)
        self.accumulators = {}  # registers -> (warpgroups, 64, n)
        self.fenced = np.zeros(batch.lanes // 128, bool)
        self.at_fence = None

    def fence(self, who):
        self.fenced[who] = True
        self.at_fence = list(self.batch.registers)

    def in_flight(self, to):
        """Of each warpgroup, whether it has a product in flight for these registers."""
        found = np.zeros(len(self.fenced), bool)
        for who, _, _, what in self.groups.flying:
            if what.to == to:
                found[who] = True
        return found

    def begin(self, who, own):
        batch, launch = self.batch, self.batch.launch
        registers = [batch.full(batch.registers[index]) for index in own.to]
        flying = self.in_flight(own.to)
        if not self.fenced[who].all():
            launch.report("wgmma with no wgmma.fence before", own.line)
        elif any(batch.registers[i] is not self.at_fence[i] for i in own.a.registers) or (
            not flying.any() and any(batch.registers[i] is not self.at_fence[i] for i in own.to)
        ):
            launch.report("note: registers of a wgmma were set after the last wgmma.fence", own.line)
        self.check_untouched(own.to, registers, flying & np.isin(np.arange(len(flying)), who), own.line)
        fresh = who[~flying[who]]
        if len(fresh):
            given = accumulators(registers).reshape(len(flying), 64, -1)
            self.accumulators.setdefault(own.to, given.copy())[fresh] = given[fresh]
        lanes = np.zeros(batch.lanes, bool)
        lanes.reshape(-1, 128)[who] = True
        for index in own.to:
            batch.registers[index] = np.where(lanes, POISON, batch.registers[index])
        self.watch(who, own, PENDING)
        self.groups.begin(who, own)

    def check_untouched(self, to, registers, groups, line):
        if any((values.reshape(-1, 128)[groups] != POISON).any() for values in registers):
            self.batch.launch.report("accumulators of a wgmma were written while it was in flight", line)

    def wait(self, who, keep):
        batch, finished = self.batch, {}
        for groups, own in self.groups.wait(who, keep):
            self.run(groups, own)
            self.watch(groups, own, None)
            finished.setdefault(own.to, (own, set()))[1].update(groups.tolist())
        for groups, _, _, own in self.groups.flying:  # what they read is still being read
            self.watch(groups, own, PENDING, report=False)
        for to, (own, groups) in finished.items():
            over = ~self.in_flight(to) & np.isin(np.arange(len(self.fenced)), list(groups))
            registers = [batch.full(batch.registers[index]) for index in to]
            self.check_untouched(to, registers, over, own.line)
            lanes = np.repeat(over, 128)
            new = self.accumulators[to]
            for index, values in zip(to, registers_of(new.reshape(-1, 16, new.shape[2])), strict=True):
                batch.registers[index] = np.where(lanes, values, batch.registers[index])

    def run(self, groups, own):
        batch = self.batch
        if any(batch.registers[i] is not value for i, value in zip(own.a.registers, own.a.values, strict=True)):
            batch.launch.report("note: A registers of a wgmma were set while it was in flight", own.line)
        held = self.accumulators[own.to]
        c = np.where(own.keeps[groups][:, None, None], held[groups].astype(f8), 0.0)
        held[groups] = product(own.a.numbers(batch, groups), own.b.numbers(batch, groups).swapaxes(1, 2), c)

    def watch(self, groups, own, when, report=True):
        """The first CTA's warps read A and B, until they have waited."""
        races, launch = self.batch.races, self.batch.launch
        if races is None:
            return
        for group in groups[groups < self.batch.threads // 128]:
            for name, operand in (("A", own.a), ("B", own.b)):
                if operand.descriptor is None:
                    continue
                at = operand.addresses(np.array([group])).reshape(-1)
                for warp in range(4 * group, 4 * group + 4):
                    raced, unset = races.read(np.full(len(at), warp), at, 16, when)
                    if when is not None and report and raced.any():
                        launch.report("shared-memory race (wgmma reads)", own.line, f"{name}, warp {warp}")
                if when is None or not report:
                    continue
                if unset.any():
                    launch.report("wgmma reads uninitialized shared memory", own.line, name)
                unfenced = races.unfenced[races.granules(at, 16)]
                for by, who in ((BY_THREADS, "threads stored"), (BY_COPIES, "cp.async wrote")):
                    if (unfenced == by).any():
                        launch.report(f"wgmma reads what {who}, with no fence.proxy.async between", own.line, name)


WGMMA = r"wgmma\.(fence|commit_group|wait_group|mma_async)\.sync\.aligned(\.m64n\d+k(8|16)\.f32\.(b?f16|tf32)\.\4)?"


@instruction("wgmma", form=WGMMA)
def wgmma(program, own):
    if own.parts[1] in ("fence", "commit_group"):
        return lambda batch, mask: (batch.products.fence if own.parts[1] == "fence" else batch.products.groups.commit)(
            batch.whole_warpgroups(mask, own.line)
        )
    if own.parts[1] == "wait_group":
        keep = int(own.operands[0])
        return lambda batch, mask: batch.products.wait(batch.whole_warpgroups(mask, own.line), keep)
    n = int(re.search(r"\.m64n(\d+)k", own.op)[1])
    to, a, b, keeps, *signs_and_order = own.operands
    kind = own.type
    signs, order = signs_and_order[:2], [int(each) for each in signs_and_order[2:]]
    if signs != ["1", "1"]:
        raise own.unknown()
    indices = tuple(program.registers[name][0] for name in to)
    in_registers = isinstance(a, list)
    a_transposed, b_transposed = (0, *order) if in_registers and order else order or (0, 0)
    if kind == "tf32" and (a_transposed or b_transposed):
        raise own.unknown()
    reads = [source(program, name, "b32") for name in a] if in_registers else [source(program, a, "b64")]
    read_b, read_keeps = source(program, b, "b64"), source(program, keeps, "pred")
    a_registers = tuple(program.registers[name][0] for name in a) if in_registers else ()

    def run(batch, mask):
        who = batch.whole_warpgroups(mask, own.line)
        descriptor = lambda read: batch.of_warpgroups(read(batch), who, own.line)  # noqa: E731
        if in_registers:
            left = Operand(64, kind, registers=a_registers, values=tuple(read(batch) for read in reads))
        else:
            left = Operand(64, kind, bool(a_transposed), descriptor=descriptor(reads[0]), line=own.line)
        right = Operand(n, kind, bool(b_transposed), descriptor=descriptor(read_b), line=own.line)
        batch.products.begin(who, Product(indices, left, right, descriptor(read_keeps), own.line))

    return run
