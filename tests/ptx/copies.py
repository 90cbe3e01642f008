# SPDX-License-Identifier: Apache-2.0
"""Copies of 4 to 16 bytes a thread that run beside the threads: cp.async.

PTX ISA, "Data Movement and Conversion Instructions: Non-bulk copy". Data arrive when their group is waited for and not
before; until then their place holds NaN.
"""

import numpy as np

from .arithmetic import POISON, i8, u4
from .races import BY_COPIES, PENDING
from .translate import address, instruction, source

GLOBAL_TO_SHARED = r"(ca|cg)\.shared(::cta)?\.global(\.L2::[\w:]+)*"


@instruction("cp.async", form=rf"cp\.async\.({GLOBAL_TO_SHARED}|commit_group|wait_group|wait_all)")
def cp(program, own):
    if own.parts[2] == "commit_group":
        return lambda batch, mask: batch.copies.commit(batch.lanes_of(mask))
    if own.parts[2] in ("wait_group", "wait_all"):
        every = own.parts[2] == "wait_all"

        def wait(batch, mask):
            lanes = batch.lanes_of(mask)
            if every:
                batch.copies.commit(lanes)
            arrive(batch, lanes, 0 if every else int(own.operands[0]))

        return wait
    size = int(own.operands[2], 0)
    find_to, find_from = (address(program, operand) for operand in own.operands[:2])
    read_bytes = source(program, own.operands[3], "u32") if len(own.operands) > 3 else None

    def run(batch, mask):
        lanes, to = batch.active(mask, find_to(batch))
        given = np.full(len(lanes), size) if read_bytes is None else batch.of(lanes, read_bytes(batch))
        if ((given != 0) & (given != size)).any():
            raise own.unknown()
        data = np.zeros((len(lanes), size // 4), u4)  # what is not read is zero
        reads = given != 0
        if reads.any():
            at = batch.of(lanes, find_from(batch)).astype(i8)[reads]
            found = batch.launch.memory.read(batch, lanes[reads], at, size, own.line, "asynchronous read")
            data[reads] = found.view(u4)
        shared = batch.shared
        shared.check(to, size, own.line, "asynchronous copy")
        mine = lanes < batch.threads
        if mine.any():
            raced = batch.races.write(lanes[mine] >> 5, to[mine], size, PENDING, BY_COPIES)
            if raced.any():
                batch.launch.report("shared-memory race (cp.async)", own.line, f"{raced.sum()} threads")
        shared.rows.write(to + shared.base[lanes], size, np.full_like(data, POISON))
        batch.copies.begin(lanes, None, to, data)

    return run


def arrive(batch, lanes, keep):
    """cp.async.wait_group."""
    for who, _, to, data in batch.copies.wait(lanes, keep):
        size = data.shape[1] * 4
        batch.shared.rows.write(to + batch.shared.base[who], size, data)
        mine = who < batch.threads
        if mine.any():
            batch.races.completed_write(who[mine] >> 5, to[mine], size)
