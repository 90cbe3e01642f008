# SPDX-License-Identifier: Apache-2.0
"""PTX by hand, for what triton does not compile: threads of a warp that part, a warp for itself, and faults."""

import torch

from . import machine, translate

ENTRY = """
.version 8.0
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry by_hand({parameters})
.reqntid {threads}
{{
.reg .pred %p<16>;
.reg .b16 %rs<16>;
.reg .b32 %r<64>;
.reg .b64 %rd<16>;
mov.u32 %r0, %tid.x;
mov.u32 %r1, global_smem;
{loads}
{body}
ret;
}}
"""


def run(body, *tensors, threads=64, grid=1, shared=1024):
    """The launch of that code. %r0 is the thread, %r1 shared memory, %rd1 .. the tensors."""
    text = ENTRY.format(
        parameters=", ".join(f".param .u64 by_hand_{i}" for i in range(len(tensors))),
        threads=threads,
        loads="\n".join(f"ld.param.b64 %rd{i + 1}, [by_hand_{i}];" for i in range(len(tensors))),
        body=body,
    )
    extents = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
    addresses = torch.tensor([start for start, _ in extents], dtype=torch.int64).numpy().tobytes()
    return machine.Launch(translate.program(text, shared), (grid, 1, 1), addresses, extents).run()
