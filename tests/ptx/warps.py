# SPDX-License-Identifier: Apache-2.0
"""Instructions that exchange values inside a warp: "Parallel Synchronization and Communication Instructions"."""

import numpy as np

from .arithmetic import u4, u8
from .translate import destination, instruction, source

LANES = np.arange(32)


@instruction("shfl", form=r"shfl\.sync\.(up|down|bfly|idx)\.b32")
def shfl(program, own):
    mode = own.parts[2]
    results = own.operands[0].split("|")
    value, other, limits = (source(program, name, "b32") for name in own.operands[1:4])
    writes = [destination(program, name, kind) for name, kind in zip(results, ("b32", "pred"), strict=False)]

    def run(batch, mask):
        values = batch.by_warp(value(batch))
        by = batch.by_warp(other(batch)).astype(np.int64) & 31
        c = batch.by_warp(limits(batch)).astype(np.int64)
        segment, clamp = (c >> 8) & 31, c & 31
        last = (LANES & segment) | (clamp & ~segment)
        lane = {
            "up": lambda: LANES - by,
            "down": lambda: LANES + by,
            "bfly": lambda: LANES ^ by,
            "idx": lambda: (LANES & segment) | (by & ~segment),
        }[mode]()
        inside = lane >= last if mode == "up" else lane <= last
        lane = np.where(inside, lane, LANES)
        if mask is not None:
            there = batch.by_warp(mask)
            if (there & ~np.take_along_axis(there, lane, 1)).any():
                batch.launch.report("shfl from a thread that is not there", own.line)
        found = np.take_along_axis(values, lane, 1), np.broadcast_to(inside, values.shape)
        for write, each in zip(writes, found, strict=False):
            write(batch, each.reshape(-1), mask)

    return run


@instruction("elect", form=r"elect\.sync")
def elect(program, own):
    leader, chosen = own.operands[0].split("|")
    writes = destination(program, leader, "b32"), destination(program, chosen, "pred")

    def run(batch, mask):
        there = batch.by_warp(np.ones(1, bool) if mask is None else mask)
        first = there.argmax(1)
        writes[0](batch, np.repeat(first, 32).astype(u4), mask)
        writes[1](batch, ((first[:, None] == LANES) & there).reshape(-1), mask)

    return run


@instruction("vote", form=r"vote\.sync\.((all|any|uni)\.pred|ballot\.b32)")
def vote(program, own):
    mode = own.parts[2]
    read = source(program, own.operands[1], "pred")
    write = destination(program, own.operands[0], own.type)

    def run(batch, mask):
        there = batch.by_warp(np.ones(1, bool) if mask is None else mask)
        yes = batch.by_warp(read(batch))
        if mode == "ballot":
            found = ((yes & there).astype(u8) << LANES.astype(u8)).sum(1).astype(u4)
        else:
            every, some = (yes | ~there).all(1), (yes & there).any(1)
            found = {"all": every, "any": some, "uni": every | ~some}[mode]
        write(batch, np.repeat(found, 32), mask)

    return run


REDUCTIONS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@instruction("redux", form=r"redux\.sync\.(add|min|max|and|or|xor)\.[bsu]32")
def redux(program, own):
    reduce = REDUCTIONS[own.parts[2]].reduce
    read, write = source(program, own.operands[1], own.type), destination(program, own.operands[0], own.type)

    def run(batch, mask):
        if mask is not None and (batch.by_warp(mask).any(1) != batch.by_warp(mask).all(1)).any():
            raise own.unknown()
        values = batch.by_warp(read(batch))
        write(batch, np.repeat(reduce(values, 1, dtype=values.dtype), 32), mask)

    return run


@instruction("activemask", form=r"activemask\.b32")
def activemask(program, own):
    write = destination(program, own.operands[0], "b32")

    def run(batch, mask):
        there = batch.by_warp(np.ones(1, bool) if mask is None else mask)
        bits = (there.astype(u8) << LANES.astype(u8)).sum(1).astype(u4)
        write(batch, np.repeat(bits, 32), mask)

    return run


@instruction("bar", form=r"bar\.warp\.sync")
def warp_barrier(program, own):
    """bar.warp.sync: the threads of a warp are in step here. The other barriers end blocks."""
    return lambda batch, mask: None
