# SPDX-License-Identifier: Apache-2.0
"""Copies of boxes of a tensor by TMA, the mbarriers that they arrive at, and fences of the proxy that they use.

PTX ISA, "Data Movement and Conversion Instructions: cp.async.bulk" and "Parallel Synchronization and Communication
Instructions: mbarrier". Data arrive when somebody waits for them and not before; until then their place holds NaN.
"""

from dataclasses import dataclass, field

import numpy as np

from .arithmetic import BITS, POISON, u1
from .groups import Groups
from .memory import SHARED_BASE, memory_at, swizzled
from .parse import EmulationError
from .races import PENDING
from .translate import address, instruction, source

# --- mbarriers -------------------------------------------------------------------------------------------------------


class Mbarrier:
    def __init__(self, count, nothing):
        self.count = self.pending = count
        self.phase = self.bytes = 0
        # What those knew that have arrived in phases that are complete, and in this one.
        self.known, self.arriving = nothing, nothing.copy()

    def settle(self):
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.known = np.maximum(self.known, self.arriving)
            self.pending = self.count


@instruction("mbarrier", form=r"mbarrier\.(init|inval|arrive(\.expect_tx)?)(\.release\.cta)?\.shared(::cta)?\.b64")
def mbarrier(program, own):
    operands = own.operands if not isinstance(own.operands[0], str) else own.operands[1:]  # without the state
    find = address(program, operands[0])
    if own.parts[1] == "init":
        read = source(program, operands[1], "u32")
        return lambda batch, mask: batch.tma.init(batch, mask, find(batch), read(batch), own.line)
    if own.parts[1] == "inval":
        return lambda batch, mask: batch.tma.invalidate(batch, mask, find(batch), own.line)
    read = source(program, operands[1] if len(operands) > 1 else "1", "u32")
    expects = own.has("expect_tx")
    return lambda batch, mask: batch.tma.arrive(batch, mask, find(batch), read(batch), expects, own.line)


@instruction("fence", form=r"fence\.(proxy\.async(\.[\w:]+)?|mbarrier_init\.release\.cluster|(sc|acq_rel)\.\w+)")
def fence(program, own):
    proxy = own.has("proxy") and not own.has("global")

    def run(batch, mask):
        if proxy and batch.races:
            lanes = batch.lanes_of(mask)
            batch.races.fence(np.unique(lanes[lanes < batch.threads] >> 5))

    return run


# --- TMA -------------------------------------------------------------------------------------------------------------


@dataclass
class TensorMap:
    """A matrix in memory, and the box of it that a copy moves; `swizzle`: bytes of a row that it permutes, or 0."""

    start: int
    shape: tuple
    strides: tuple  # in elements
    box: tuple
    size: int  # bytes of an element
    swizzle: int

    @property
    def bytes(self):
        return self.box[0] * self.box[1] * self.size

    def window(self, memory, corner):
        """(slices of the box, memory) of what lies inside the matrix; None where nothing does."""
        low = [max(0, -at) for at in corner]
        high = [min(box, size - at) for at, box, size in zip(corner, self.box, self.shape, strict=True)]
        if any(end <= start for start, end in zip(low, high, strict=True)):
            return None
        first = [at + start for at, start in zip(corner, low, strict=True)]
        start = self.start + self.size * sum(at * stride for at, stride in zip(first, self.strides, strict=True))
        shape = tuple(end - begin for begin, end in zip(low, high, strict=True))
        last = sum((count - 1) * stride for count, stride in zip(shape, self.strides, strict=True))
        memory.check(np.array([start]), 1, 0, "TMA")
        memory.check(np.array([start + last * self.size]), self.size, 0, "TMA")
        return tuple(map(slice, low, high)), memory_at(start, shape, self.strides, self.size)

    def units(self, at):
        """Addresses of the box's units of 16 bytes in shared memory."""
        if self.swizzle and self.box[1] * self.size > self.swizzle:
            raise EmulationError(f"TMA: a box of {self.box[1] * self.size} bytes with rows of {self.swizzle}")
        return swizzled(at + 16 * np.arange(self.bytes // 16), self.swizzle)


@dataclass
class Copy:
    map: TensorMap
    corner: list
    at: int  # in shared memory
    mbarrier: int
    line: int


@dataclass
class Tma:
    """The mbarriers of each CTA, loads that nobody has waited for, and stores in their groups."""

    stores: Groups
    mbarriers: dict = field(default_factory=dict)  # (CTA, address) ->
    loads: dict = field(default_factory=dict)  # (CTA, address of the mbarrier) -> [Copy]

    def mbarrier(self, batch, cta, at, line):
        if (cta, at) not in self.mbarriers:
            batch.launch.fail("mbarrier that is not initialized", line, f"at {at - SHARED_BASE}")
        return self.mbarriers[cta, at]

    def touch(self, batch, lane, at, line):
        if lane < batch.threads and batch.races.write(np.array([lane >> 5]), np.array([at]), 8).any():
            batch.launch.report("shared-memory race (mbarrier)", line)

    def init(self, batch, mask, where, counts, line):
        for lane, at, count in batch.each(mask, where, counts):
            batch.shared.check(np.array([at]), 8, line, "mbarrier")
            self.mbarriers[lane // batch.threads, at] = Mbarrier(count, np.zeros(batch.threads // 32 + 1, np.int32))
            self.touch(batch, lane, at, line)

    def invalidate(self, batch, mask, where, line):
        for lane, at in batch.each(mask, where):
            key = lane // batch.threads, at
            self.mbarrier(batch, *key, line)
            if self.loads.get(key):
                batch.launch.report("mbarrier invalidated while copies are in flight", line)
            del self.mbarriers[key]
            self.touch(batch, lane, at, line)

    def arrive(self, batch, mask, where, numbers, expects, line):
        """`numbers` are bytes to expect, of one arrival, or arrivals."""
        for lane, at, number in batch.each(mask, where, numbers):
            own = self.mbarrier(batch, lane // batch.threads, at, line)
            own.bytes += number if expects else 0
            own.pending -= 1 if expects else number
            if own.pending < 0:
                batch.launch.fail("more arrivals at an mbarrier than it expects", line)
            if lane < batch.threads:
                own.arriving = np.maximum(own.arriving, batch.races.released(lane >> 5))
            own.settle()

    def ready(self, batch, lanes, where, parity, line):
        """Of each lane, whether the phase that it waits for is complete. What it waits for arrives."""
        answers = {}
        for lane, at, old in batch.each_of(lanes, where, parity):
            key = lane // batch.threads, at
            own = self.mbarrier(batch, *key, line)
            if own.phase == old:
                for load in self.loads.pop(key, []):
                    self.land(batch, key[0], own, load)
            answers[lane] = own.phase != old
            if answers[lane] and lane < batch.threads and lane % 32 == 0:
                if batch.races.read(np.array([lane >> 5]), np.array([at]), 8)[0].any():
                    batch.launch.report("shared-memory race (mbarrier wait)", line)
                batch.races.acquired(lane >> 5, own.known)
        return np.array([answers[lane] for lane in lanes])

    def load(self, batch, lane, own):
        shared, races, cta = batch.shared, batch.races, lane // batch.threads
        self.mbarrier(batch, cta, own.mbarrier, own.line)
        self.loads.setdefault((cta, own.mbarrier), []).append(own)
        shared.rows.words[(cta * shared.stride + own.at) // 4 :][: own.map.bytes // 4] = POISON
        batch.launch.counters["TMA ld bytes"] += own.map.bytes
        if cta == 0:
            races.acquired(
                races.engine, np.where(np.arange(races.engine + 1) == races.engine, 0, races.clock[lane >> 5])
            )
            where = np.array([own.at])
            if races.write(np.array([races.engine]), where, own.map.bytes, PENDING, 0).any():
                batch.launch.report("shared-memory race (TMA load)", own.line)

    def land(self, batch, cta, mbarrier, own):
        box = np.zeros(own.map.box, BITS[own.map.size])
        memory, shared, races = batch.launch.memory, batch.shared, batch.races
        if found := own.map.window(memory, own.corner):
            box[found[0]] = found[1]
            batch.launch.counters["ld bytes"] += found[1].nbytes
            memory.check_written(_rows_of(found[1]), np.ascontiguousarray(found[1]), own.line)
        shared.rows.write(own.map.units(own.at) + cta * shared.stride, 16, box.reshape(-1).view(u1).reshape(-1, 16))
        mbarrier.bytes -= box.nbytes
        if cta == 0:
            races.completed_write(np.array([races.engine]), np.array([own.at]), box.nbytes)
            mbarrier.arriving[races.engine] = races.released(races.engine)[races.engine]
        mbarrier.settle()

    def store(self, batch, lane, own):
        self.stores.begin(np.array([lane]), own)
        batch.launch.counters["TMA st bytes"] += own.map.bytes
        races = batch.races
        if lane < batch.threads:
            where = races.granules(np.array([own.at]), own.map.bytes)
            unfenced = races.unfenced[where].any()
            races.acquired(
                races.engine, np.where(np.arange(races.engine + 1) == races.engine, 0, races.clock[lane >> 5])
            )
            raced, unset = races.read(np.array([races.engine]), np.array([own.at]), own.map.bytes, PENDING)
            for wrong, what in (
                (raced.any(), "shared-memory race (TMA store reads)"),
                (unset.any(), "TMA store of uninitialized shared memory"),
                (unfenced, "TMA store of what threads wrote, with no fence.proxy.async between"),
            ):
                if wrong:
                    batch.launch.report(what, own.line)

    def finish_stores(self, batch, lanes, keep):
        """cp.async.bulk.wait_group: the stores read what is in shared memory now."""
        shared, races = batch.shared, batch.races
        for who, own in self.stores.wait(lanes, keep):
            cta = int(who[0]) // batch.threads
            units = shared.rows.read(own.map.units(own.at) + cta * shared.stride, 16)
            box = np.ascontiguousarray(units).reshape(-1).view(BITS[own.map.size]).reshape(own.map.box)
            if found := own.map.window(batch.launch.memory, own.corner):
                found[1][...] = box[found[0]]
                batch.launch.counters["st bytes"] += found[1].nbytes
            if cta == 0:
                races.read(np.array([races.engine]), np.array([own.at]), own.map.bytes)
                # Who has waited knows of it; the others hear of it at a barrier.
                waited = int(who[0]) % batch.threads >> 5
                races.clock[waited, races.engine] = races.clock[races.engine, races.engine]
                races.clock[races.engine, races.engine] += 1


def _rows_of(view):
    """The address of each row."""
    return view.__array_interface__["data"][0] + view.strides[0] * np.arange(len(view))


TENSOR = "|".join(
    (
        r"tensor\.2d\.shared::\w+\.global(\.tile)?\.mbarrier::complete_tx::bytes(\.L2::cache_hint)?",
        r"tensor\.2d\.global\.shared::cta(\.tile)?\.bulk_group(\.L2::cache_hint)?",
    )
)


@instruction("cp.async.bulk", form=rf"cp\.async\.bulk\.({TENSOR}|commit_group|wait_group(\.read)?)")
def bulk(program, own):
    """cp.async.bulk: copies of boxes, which one thread starts."""
    if own.parts[3] == "commit_group":
        return lambda batch, mask: batch.tma.stores.commit(batch.lanes_of(mask))
    if own.parts[3] == "wait_group":
        keep = int(own.operands[0])
        return lambda batch, mask: batch.tma.finish_stores(batch, batch.lanes_of(mask), keep)
    loads = own.parts[5].startswith("shared")
    tensor, shared = own.operands[:2] if not loads else own.operands[1::-1]
    find_map, find = (address(program, operand) for operand in (tensor, shared))
    corner = [source(program, name, "s32") for name in reversed(tensor.coordinates)]  # the last dimension comes first
    find_mbarrier = address(program, own.operands[2]) if loads else None

    def run(batch, mask):
        numbers = [find(batch), find_map(batch), *(read(batch) for read in corner)]
        if loads:
            numbers.append(find_mbarrier(batch))
        for lane, at, which, row, column, *mbarrier in batch.each(mask, *numbers):
            tensor_map = batch.launch.maps.get(which)
            if tensor_map is None:
                batch.launch.fail("TMA with an unknown tensor map", own.line, hex(which))
            if at % 128 or at < SHARED_BASE or at + tensor_map.bytes > batch.shared.end:
                batch.launch.fail("out of bounds or misaligned: TMA", own.line, f"at {at - SHARED_BASE}")
            one = Copy(tensor_map, [row, column], at, mbarrier[0] if loads else 0, own.line)
            (batch.tma.load if loads else batch.tma.store)(batch, lane, one)

    return run
