# SPDX-License-Identifier: Apache-2.0
"""Global, shared and parameter memory: "Data Movement and Conversion Instructions: ld, st", and their checks."""

from types import SimpleNamespace

import numpy as np

from .arithmetic import BITS, POISON, i8, u4, u8
from .counters import sectors, wavefronts
from .parse import SIZES
from .translate import PARAMETER_BASE, SHARED_BASE, address, destination, instruction, source, vector

LOWEST = 16  # numpy takes no array at address 0


class Rows:
    """Memory as rows of each number of bytes that a thread may access at once."""

    def __init__(self, words):
        self.words = words
        self.rows = {size: words.view(BITS[size])[:, None] for size in (1, 2, 4)}
        self.rows |= {size: words.reshape(-1, size // 4) for size in (8, 16)}

    def read(self, at, total):
        return self.rows[total][at >> (total.bit_length() - 1)]

    def write(self, at, total, data):
        rows = self.rows[total]
        rows[at >> (total.bit_length() - 1)] = data.view(rows.dtype)


def memory_at(start, shape, strides, size):
    """Memory of this process as an array of unsigned integers of that size; strides in elements."""
    strides = tuple(stride * size for stride in strides)
    own = {"data": (start, False), "shape": shape, "strides": strides, "typestr": f"<u{size}", "version": 3}
    return np.asarray(SimpleNamespace(__array_interface__=own))


PROCESS = Rows(memory_at(LOWEST, (1 << 45,), (1,), 4))  # all of it: what a launch was not given is never touched


class GlobalMemory:
    """The tensors of a launch: (start, end) of each, and (start, end, pattern) of those that nobody has written.

    The pattern is what the driver has filled them with. One that a kernel loads is reported.
    """

    def __init__(self, launch, extents, unwritten):
        self.launch, self.unwritten = launch, unwritten
        merged = []
        for start, end in sorted(extents):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], end)
            else:
                merged.append([start, end])
        self.starts, self.ends = np.array(merged, i8).reshape(-1, 2).T

    def check(self, at, total, line, what):
        nearest = np.searchsorted(self.starts, at, side="right") - 1
        outside = (nearest < 0) | (at + total > self.ends[nearest])
        if outside.any():
            first = int(at[outside][0])
            near = self.starts[nearest[outside][0]] if nearest[outside][0] >= 0 else self.starts.min(initial=0)
            self.launch.fail(
                f"out of bounds: {what} of {total} bytes",
                line,
                f"{outside.sum()} threads, the first {first - near} bytes behind the start of a tensor",
            )
        if (at & (total - 1)).any():
            self.launch.fail(f"misaligned {what} of {total} bytes", line)

    def read(self, batch, lanes, at, total, line, what="read"):
        self.check(at, total, line, what)
        self.count(batch, lanes, at, total, "ld")
        data = PROCESS.read(at - LOWEST, total)
        self.check_written(at, data, line)
        return data

    def check_written(self, at, data, line):
        """`data` are rows of bytes in memory, `at` says where."""
        for start, end, pattern in self.unwritten:
            inside = (at >= start) & (at < end)
            if len(pattern) <= data.itemsize * data.shape[1] and inside.any():
                values = np.ascontiguousarray(data[inside]).view(f"u{len(pattern)}")
                if (values == int.from_bytes(pattern, "little")).any():
                    self.launch.report("read of uninitialized global memory", line)

    def write(self, batch, lanes, at, data, line):
        total = data.shape[1] * data.itemsize
        self.check(at, total, line, "write")
        self.count(batch, lanes, at, total, "st")
        PROCESS.write(at - LOWEST, total, data)
        if (PROCESS.read(at - LOWEST, total).view(data.dtype) != data).any():
            self.launch.report("different values written to one address by one instruction", line)

    def count(self, batch, lanes, at, total, verb):
        self.launch.counters[f"{verb} bytes"] += len(at) * total
        mine = lanes < batch.threads
        if mine.any():
            self.launch.count(f"{verb} sectors", *sectors(lanes[mine] >> 5, at[mine], total))


class SharedMemory:
    """The shared memory of all CTAs of a batch, one behind the other."""

    def __init__(self, batch, end):
        self.batch, self.end = batch, end
        self.stride = -(-end // 16) * 16 + 16
        self.rows = Rows(np.full(batch.ctas * self.stride // 4, POISON))
        self.base = np.repeat(np.arange(batch.ctas) * self.stride, batch.threads)

    def check(self, at, total, line, what):
        launch = self.batch.launch
        if len(at) and (at.min() < SHARED_BASE or at.max() + total > self.end):
            low, high = at.min() - SHARED_BASE, at.max() + total - SHARED_BASE
            launch.fail(
                f"out of bounds: {what} of {total} bytes of shared memory",
                line,
                f"{low} to {high} of {self.end - SHARED_BASE}",
            )
        if (at & (total - 1)).any():
            launch.fail(f"misaligned {what} of {total} bytes of shared memory", line)

    def read(self, lanes, at, total, line, what="read"):
        self.check(at, total, line, what)
        self.watch(lanes, at, total, line, what, False)
        return self.rows.read(at + self.base[lanes], total)

    def write(self, lanes, at, data, line, what="write"):
        total = data.shape[1] * data.itemsize
        self.check(at, total, line, what)
        self.watch(lanes, at, total, line, what, True)
        self.rows.write(at + self.base[lanes], total, data)
        if (self.rows.read(at + self.base[lanes], total).view(data.dtype) != data).any():
            # Sums that several threads hold may differ by a rounding, where each has added in an order of its own.
            self.batch.launch.report("note: different values written to one shared address by one instruction", line)

    def watch(self, lanes, at, total, line, what, writes):
        """Races and bank conflicts of the first CTA."""
        races, launch = self.batch.races, self.batch.launch
        mine = lanes < self.batch.threads
        if not mine.any():
            return
        warps, at = lanes[mine] >> 5, at[mine]
        if writes:
            raced = races.write(warps, at, total)
        else:
            raced, unset = races.read(warps, at, total)
            if unset.any():
                launch.report("read of uninitialized shared memory", line, f"{unset.sum()} threads")
        if raced.any():
            launch.report(f"shared-memory race ({what})", line, f"{raced.sum()} threads")
        # Rows of a matrix come from 8 threads at a time, 16 bytes each, as in the accesses of whole threads.
        launch.count(f"{'st' if writes else 'ld'}.shared wavefronts", *wavefronts(lanes[mine], at, total))


def _space(own):
    """(global, shared or param, the number of values) of an instruction whose other modifiers mean nothing here."""
    space = own.parts[1].split("::")[0]
    count = next((int(part[1:]) for part in own.parts if part in ("v2", "v4", "v8")), 1)
    if SIZES[own.type] * count > 16:
        raise own.unknown()
    return space, count


@instruction("ld", form=r"ld\.(global|shared|param)(::\w+)?(\.(ca|cg|cs|lu|nc|L[12]::[\w:]+))*(\.v[248])?\.\w+")
def ld(program, own):
    space, count = _space(own)
    results, where = vector(own.operands[0]), own.operands[1]
    if len(results) != count:
        raise own.unknown()
    writes = [destination(program, name, own.type) for name in results]
    size, decode = SIZES[own.type], _numbers(own.type)
    if space == "param":
        return _ld_param(program, own, where, writes)
    find, total = address(program, where), size * count

    def run(batch, mask):
        lanes, at = batch.active(mask, find(batch))
        if space == "global":
            data = batch.launch.memory.read(batch, lanes, at, total, own.line)
        else:
            data = batch.shared.read(lanes, at, total, own.line)
        values = np.ascontiguousarray(data.view(BITS[size]).T)
        if mask is not None:
            some, values = values, np.zeros((count, batch.lanes), BITS[size])
            values[:, lanes] = some
        for write, value in zip(writes, values, strict=True):
            write(batch, decode(value), mask)

    return run


def _numbers(kind):
    if kind[0] not in "bus":
        return _numbers(f"b{8 * SIZES[kind]}")
    return (lambda bits: bits.view(f"i{bits.itemsize}")) if kind[0] == "s" else lambda bits: bits


def _ld_param(program, own, where, writes):
    size, decode = SIZES[own.type], _numbers(own.type)
    find = address(program, where)  # a register may hold the address of one parameter or another

    def run(batch, mask):
        first = (find(batch).astype(u8) - u8(PARAMETER_BASE)) // u8(size)
        values = batch.launch.parameters.view(BITS[size])
        for place, write in enumerate(writes):
            write(batch, decode(values[first + u8(place)]), mask)

    return run


@instruction("st", form=r"st\.(global|shared)(::\w+)?(\.(wb|cg|cs|wt|L[12]::[\w:]+))*(\.v[248])?\.\w+")
def st(program, own):
    space, count = _space(own)
    where, values = own.operands[0], vector(own.operands[1])
    if len(values) != count:
        raise own.unknown()
    find, size = address(program, where), SIZES[own.type]
    reads = [source(program, name, f"b{8 * size}") for name in values]

    def run(batch, mask):
        lanes, at = batch.active(mask, find(batch))
        data = np.stack([batch.of(lanes, read(batch)) for read in reads], axis=1)
        if space == "global":
            batch.launch.memory.write(batch, lanes, at, data, own.line)
        else:
            batch.shared.write(lanes, at, data, own.line)

    return run


@instruction("atom", form=r"atom\.global\.gpu\.(relaxed|acquire|release|acq_rel)\.add\.u32")
def atom(program, own):
    """Thread after thread: nobody comes between what one reads and what it writes."""
    result, where, operand = own.operands
    find, read, write = address(program, where), source(program, operand, "u32"), destination(program, result, "u32")

    def run(batch, mask):
        lanes, at = batch.active(mask, find(batch))
        added, memory, found = batch.of(lanes, read(batch)), batch.launch.memory, np.zeros(batch.lanes, u4)
        for i in range(len(lanes)):
            who, here = lanes[i : i + 1], at[i : i + 1]
            data = memory.read(batch, who, here, 4, own.line).view(u4)
            found[who] = data[:, 0]
            memory.write(batch, who, here, data + added[i], own.line)
        write(batch, found, mask)

    return run


def swizzled(at, row):
    """Where TMA and wgmma find an address in rows of 32, 64 or 128 bytes, 0 for rows as they are."""
    return at ^ ((at >> 3) & {0: 0, 32: 0x10, 64: 0x30, 128: 0x70}[row])
