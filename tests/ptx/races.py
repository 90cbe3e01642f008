# SPDX-License-Identifier: Apache-2.0
"""Shared-memory races of one CTA, found by vector clocks of its warps and of its copy engine.

An access races with an earlier one, of which at least one writes, if no barrier, mbarrier or wait orders them (PTX ISA,
"Memory Consistency Model"). Threads of one warp run in step here, so that races among them are not seen.
"""

import numpy as np

from .parse import SIZES

PENDING = 1 << 30  # the time of an asynchronous access that nobody has waited for
BY_THREADS, BY_COPIES = 1, 2  # who has written what the asynchronous proxy cannot see before a fence


def granule(program):
    """The fewest bytes that an access of shared memory has: what is told apart."""
    widths = [16]
    for own in (own for block in program.entry.blocks for own in block.instructions):
        if own.op.startswith(("ld.shared", "st.shared")):
            count = next((int(part[1:]) for part in own.parts if part in ("v2", "v4", "v8")), 1)
            widths.append(SIZES[own.type] * count)
        elif own.op.startswith(("cp.async.ca", "cp.async.cg")):
            widths.append(int(own.operands[2], 0))
    return min(widths)


class Races:
    def __init__(self, end, granule, warps):
        self.granule, self.warps, self.engine = granule, np.arange(warps), warps
        count = end // granule + 1
        self.writer = np.full(count, -1, np.int16)
        self.written = np.zeros(count, np.int32)  # the writer's time
        self.read_at = np.zeros((warps + 1, count), np.int32)  # each reader's time
        self.initialized = np.zeros(count, bool)
        self.unfenced = np.zeros(count, np.int8)
        self.clock = np.eye(warps + 1, dtype=np.int32)  # what each knows of the times of all

    def granules(self, at, total):
        return at[:, None] // self.granule + np.arange(max(total // self.granule, 1))

    def _unseen_write(self, who, where):
        writer, written = self.writer[where], self.written[where]
        unseen = (written > self.clock[who, writer]) & (writer != who) & (writer >= 0)
        return unseen | ((written == PENDING) & (writer >= 0))

    def read(self, who, at, total, when=None):
        """(those that race, those that find what nobody wrote) of accesses by the warps `who`; PENDING if they last."""
        where = self.granules(at, total)
        who = np.broadcast_to(who[:, None], where.shape)
        raced = self._unseen_write(who, where)
        self.read_at[who, where] = self.clock[who, who] if when is None else when
        return raced.any(1), ~self.initialized[where].all(1)

    def write(self, who, at, total, when=None, by=BY_THREADS):
        """Those that race."""
        where = self.granules(at, total)
        who = np.broadcast_to(who[:, None], where.shape)
        raced = self._unseen_write(who, where)
        for other in range(self.engine + 1):
            read = self.read_at[other][where]
            raced |= ((read > self.clock[who, other]) & (who != other)) | (read == PENDING)
        self.writer[where] = who
        self.written[where] = self.clock[who, who] if when is None else when
        self.initialized[where] = True
        self.unfenced[where] = by
        return raced.any(1)

    def completed_write(self, who, at, total):
        """What was PENDING is done, and known to the warps that have waited."""
        self.written[self.granules(at, total)] = self.clock[who, who][:, None]

    def barrier(self, warps):
        """They know of each other all that each knows."""
        self.clock[warps] = self.clock[warps].max(0)
        self.clock[warps, warps] += 1

    def released(self, who):
        """What `who` hands to whoever acquires: all that it knows."""
        known = self.clock[who].copy()
        self.clock[who, who] += 1
        return known

    def acquired(self, who, known):
        """It keeps its own time, of which nobody knows more."""
        own = self.clock[who, who]
        np.maximum(self.clock[who], known, out=self.clock[who])
        self.clock[who, who] = own

    def fence(self, warps):
        """fence.proxy.async: what these warps wrote is visible to the asynchronous proxy."""
        self.unfenced[np.isin(self.writer, warps)] = 0
