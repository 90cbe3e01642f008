# SPDX-License-Identifier: Apache-2.0
"""Products of warpgroups: "Asynchronous Warpgroup Level Matrix Instructions".

They run when they are waited for. Until then their accumulators hold NaN, and what they read is being read.
"""

import re
from dataclasses import dataclass

import numpy as np

from .arithmetic import POISON, f8, i8, operand_of_product, u2, u4, u8
from .groups import Groups
from .memory import swizzled
from .products import a_fragment, accumulators, product, registers_of
from .races import BY_COPIES, BY_THREADS, PENDING
from .translate import instruction, source

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
