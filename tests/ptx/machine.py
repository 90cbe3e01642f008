# SPDX-License-Identifier: Apache-2.0
"""A launch: batches of CTAs whose threads run together, block by block.

Threads that have branched apart run under masks, those at the lowest address first, until they meet again. A CTA waits
at its barriers, and there its warps wait for those of their threads that meet them no earlier; a wait that nobody is
left to end is a fault.
"""

import time
from collections import Counter

import numpy as np

from . import copies, instructions, memory, moves, products, tma, warps, wgmma  # noqa: F401 (they register themselves)
from .arithmetic import bits_of, i8, u4
from .counters import instruction_class
from .groups import Groups
from .memory import GlobalMemory, SharedMemory
from .parse import EmulationError
from .races import Races, granule
from .tma import Tma
from .translate import address, source
from .wgmma import Products

LANES = 4096  # threads of a batch
SHARED_BYTES = 64 << 20  # and their shared memory, at most
RUNS, AT_BARRIER, AT_MBARRIER, GONE = range(4)


class Launch:
    """One launch of a program over a grid.

    parameters: bytes. extents: (start, end) of each memory that may be touched. maps: address of a parameter ->
    TensorMap. unwritten: (start, end, pattern) of memory that nobody has written. What is wrong with an address raises
    EmulationError; `faults` holds everything else. `counters` are sums over all CTAs, but for sectors and wavefronts,
    which are those of the first CTA of each batch.
    """

    def __init__(self, program, grid, parameters, extents, maps=None, unwritten=()):
        self.program, self.grid = program, grid
        self.parameters, self.maps = np.frombuffer(parameters, np.uint8), maps or {}
        self.memory = GlobalMemory(self, extents, unwritten)
        self.reports, self.counters, self.executed = {}, Counter(), Counter()
        self.seconds = 0.0

    def run(self):
        began = time.perf_counter()
        program, total = self.program, int(np.prod(self.grid))
        size = min(LANES // program.entry.threads, SHARED_BYTES // (program.shared_end + 16)) or 1
        with np.errstate(all="ignore"):
            for first in range(0, total, size):
                Batch(self, np.arange(first, min(first + size, total))).run()
        for index, count in self.executed.items():
            for name, each in classes(program, index).items():
                self.counters[f"{name} instructions"] += each * count
        self.seconds = time.perf_counter() - began
        return self

    def source(self, line):
        lines = self.program.entry.lines
        return lines[line - 1].strip() if 0 < line <= len(lines) else ""

    def report(self, what, line, detail=""):
        count, first = self.reports.get((what, line), (0, detail))
        self.reports[what, line] = count + 1, first

    def fail(self, what, line, detail=""):
        raise EmulationError(f"{what} in line {line}: {self.source(line)}; {detail}")

    def count(self, what, asked, needed):
        self.counters[what] += asked
        self.counters[f"{what} needed"] += needed

    @property
    def faults(self):
        return [what for what, _ in self.reports if not what.startswith("note")]

    def describe(self):
        return "\n".join(
            f"{what} ({count}x) in line {line}: {self.source(line)} {detail}"
            for (what, line), (count, detail) in self.reports.items()
        )


def classes(program, index):
    """How many instructions of each class a block has."""
    block = program.entry.blocks[index]
    return Counter(instruction_class(own.op) for own in [*block.instructions, *([block.end] if block.end else [])])


class Batch:
    """CTAs that run side by side: registers of all their threads, and what they have in flight."""

    def __init__(self, launch, ctas):
        self.launch, self.program = launch, launch.program
        self.threads, self.ctas = self.program.entry.threads, len(ctas)
        self.lanes = self.threads * self.ctas
        self.everyone = np.arange(self.lanes)
        self.registers = [np.zeros(1, bits_of(kind)) for _, kind in self.program.registers.values()]
        self.special = self._special(ctas)
        self.shared = SharedMemory(self, self.program.shared_end)
        self.races = Races(self.program.shared_end, granule(self.program), -(-self.threads // 32))
        self.copies, self.tma = Groups(self.lanes), Tma(Groups(self.lanes))
        self.products = Products(self)
        self.at = np.zeros(self.lanes, i8)  # the block of each thread
        self.state = np.full(self.lanes, RUNS)
        self.barrier = np.zeros((2, self.lanes), i8)  # the number of each thread's barrier, and who else is to come

    def _special(self, ctas):
        thread = np.tile(np.arange(self.threads, dtype=u4), self.ctas)
        x, y, z = self.launch.grid
        own = {"%tid.x": thread, "%laneid": thread & u4(31), "%warpid": thread >> u4(5), "%ntid.x": self.threads}
        own |= {"%nctaid.x": x, "%nctaid.y": y, "%nctaid.z": z, "%ntid.y": 1, "%ntid.z": 1, "%tid.y": 0, "%tid.z": 0}
        for name, value in zip("xyz", (ctas % x, ctas // x % y, ctas // x // y), strict=True):
            own[f"%ctaid.{name}"] = np.repeat(value, self.threads) if self.ctas > 1 else value
        return {name: np.atleast_1d(np.asarray(value, u4)) for name, value in own.items()}

    # --- values of some threads ---

    def full(self, values):
        return values if len(values) == self.lanes else np.broadcast_to(values, (self.lanes,))

    def lanes_of(self, mask):
        return self.everyone if mask is None else np.flatnonzero(mask)

    def of(self, lanes, values):
        if len(values) == 1:
            return np.broadcast_to(values, (len(lanes),))
        return values if len(lanes) == self.lanes else values[lanes]

    def active(self, mask, addresses):
        lanes = self.lanes_of(mask)
        return lanes, self.of(lanes, addresses).astype(i8)

    def each_of(self, lanes, *values):
        return zip(lanes.tolist(), *(self.of(lanes, value).tolist() for value in values), strict=True)

    def each(self, mask, *values):
        """(lane, numbers ..) of every thread that takes part."""
        return self.each_of(self.lanes_of(mask), *values)

    def by_warp(self, values):
        return self.full(values).reshape(-1, 32)

    def whole_warps(self, mask, line, size=32):
        """Their numbers; all threads of a warp (or more) must take part."""
        if mask is None:
            return np.arange(self.lanes // size)
        there = mask.reshape(-1, size)
        if (there.any(1) != there.all(1)).any():
            self.launch.fail("a part of a warp at an instruction that is for all of it", line)
        return np.flatnonzero(there[:, 0])

    def whole_warpgroups(self, mask, line):
        return self.whole_warps(mask, line, 128)

    def of_warpgroups(self, values, who, line):
        values = self.full(values).reshape(-1, 128)
        if (values[who] != values[who, :1]).any():
            self.launch.fail("threads of a warpgroup disagree", line)
        return values[:, 0]

    # --- control flow ---

    def run(self):
        while (runs := self.state == RUNS).any() or self._wake():
            if not runs.any():
                continue
            pc = int(self.at[runs].min())
            active = runs & (self.at == pc)
            self._run_block(pc, None if active.all() else active)
        if (self.state != GONE).any():
            self._check_warps(np.flatnonzero(self.state == AT_BARRIER))
            stuck = sorted({self.program.entry.blocks[pc].end.line for pc in self.at[self.state != GONE]})
            self.launch.fail("deadlock: nobody is left to end these waits", stuck[0], f"lines {stuck}")
        self._finish()

    def _run_block(self, pc, active):
        """Runs a block, and those that all of its threads go to together after it."""
        program, launch = self.program, self.launch
        while True:
            for predicate, negated, run in program.block(pc):
                if predicate is None:
                    run(self, active)
                    continue
                mask = self.registers[predicate]
                mask = ~mask if negated else mask
                mask = self.full(mask if active is None else mask & active)
                count = np.count_nonzero(mask)
                if count:
                    run(self, None if count == self.lanes else mask)
            launch.executed[pc] += self.lanes // 32 if active is None else int(active.reshape(-1, 32).any(1).sum())
            block = program.entry.blocks[pc]
            if block.end is not None and not self._unconditional(block):
                break
            pc = block.targets[0] if block.end is not None else pc + 1
            if active is not None:  # others may be there already, or at a lower address
                break
        lanes = self.lanes_of(active)
        if block.end is None or self._unconditional(block):
            self.at[lanes] = pc
        else:
            self._end(pc, block, lanes, active)

    def _unconditional(self, block):
        return block.end.parts[0] == "bra" and block.end.predicate is None

    def _end(self, pc, block, lanes, active):
        own = block.end
        head = own.parts[0]
        taken = np.ones(len(lanes), bool)
        if own.predicate is not None:
            taken = self.of(lanes, self.registers[self.program.registers[own.predicate][0]]) != own.negated
        if head == "bra":
            self.at[lanes] = np.where(taken, block.targets[0], pc + 1)
        elif head == "brx":
            index = self.of(lanes, self.registers[self.program.registers[own.operands[0]][0]])
            self.at[lanes] = np.array(block.targets)[index.astype(i8)]
        elif head in ("ret", "exit"):
            self.at[lanes] = pc + 1
            self.state[lanes[taken]] = GONE
        elif not taken.all():
            raise own.unknown()
        elif head == "mbarrier":
            self.at[lanes] = pc
            self.state[lanes] = AT_MBARRIER
            self._wake_from_mbarrier(pc, lanes)
        elif own.op.startswith(("bar.sync", "barrier.sync")):
            number, *count = [source(self.program, name, "u32")(self) for name in own.operands]
            self.barrier[0, lanes] = self.of(lanes, number)
            self.barrier[1, lanes] = self.of(lanes, count[0]) if count else self.threads
            self.at[lanes] = pc
            self.state[lanes] = AT_BARRIER
            self._release(own.line)
        else:
            raise own.unknown()

    def _release(self, line):
        """Lets threads go whose barrier is complete."""
        lanes = np.flatnonzero(self.state == AT_BARRIER)
        cta = lanes // self.threads
        _, first, which, there = np.unique(
            cta << 32 | self.barrier[0, lanes], return_index=True, return_inverse=True, return_counts=True
        )
        expected = self.barrier[1, lanes]
        if (expected != expected[first][which]).any() or (there > expected[first]).any():
            self.launch.fail("threads at a barrier expect other numbers of threads", line, f"{np.unique(expected)}")
        done = (there == expected[first])[which]
        if done.any():
            go = lanes[done]
            self._check_warps(go)
            for group in np.flatnonzero(there == expected[first]):
                if cta[first[group]] == 0:
                    self.races.barrier(np.unique(lanes[which == group] >> 5))
            self.state[go] = RUNS
            self.at[go] += 1

    def _check_warps(self, waiting):
        """Fails where a warp is not as a whole among those that wait, at one barrier."""
        ends = {pc: self.program.entry.blocks[pc].end for pc in np.unique(self.at[waiting]).tolist()}
        alone = np.isin(self.at[waiting], [pc for pc, own in ends.items() if own.op == "barrier.sync"])
        where = np.full(self.lanes, -1)
        where[waiting] = self.at[waiting]
        of_warps = where.reshape(-1, 32)[np.unique(waiting[~alone] >> 5)]
        if (torn := (of_warps != of_warps[:, :1]).any(1)).any():
            line = ends[int(of_warps[torn].max())].line
            self.launch.fail("a part of a warp at an instruction that is for all of it", line)

    def _wake_from_mbarrier(self, pc, lanes):
        """Lets those go whose phase is complete, and those whose try_wait is not repeated until it succeeds."""
        own = self.program.entry.blocks[pc].end
        if own.has("test_wait") or not self.program.repeats(pc):
            done = np.zeros(len(lanes), bool)
            self.state[lanes] = RUNS
            self.at[lanes] += 1
        else:
            find, parity = address(self.program, own.operands[1]), source(self.program, own.operands[2], "u32")
            done = self.tma.ready(self, lanes, find(self), parity(self), own.line)
            self.state[lanes[done]] = RUNS
            self.at[lanes[done]] += 1
        index = self.program.registers[own.operands[0]][0]
        found = self.full(self.registers[index]).copy()
        found[lanes] = done
        self.registers[index] = found
        return done.any()

    def _wake(self):
        """Whether anybody whose wait has ended goes on."""
        waiting = np.flatnonzero(self.state == AT_MBARRIER)
        return any(
            [self._wake_from_mbarrier(int(pc), waiting[self.at[waiting] == pc]) for pc in np.unique(self.at[waiting])]
        )

    def _finish(self):
        report = self.launch.report
        if any((self.copies.committed[who] == number).any() for who, number, *_ in self.copies.flying):
            report("cp.async that was never committed", 0)
        for who, number, _, own in self.tma.stores.flying:
            # What it has yet to read may belong to another CTA by then.
            missing = "waited for" if (self.tma.stores.committed[who] > number).all() else "committed"
            report(f"TMA store that nobody {missing}", own.line)
        self.tma.stores.commit(self.everyone)
        self.tma.finish_stores(self, self.everyone, 0)
        for load in (load for loads in self.tma.loads.values() for load in loads):
            report("TMA load that nobody waited for", load.line)
        if self.copies.flying:
            report("note: cp.async that nobody waited for", 0)
        for *_, own in self.products.groups.flying:
            report("wgmma that nobody waited for", own.line)
