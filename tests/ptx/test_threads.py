# SPDX-License-Identifier: Apache-2.0
"""Threads by hand: code in which they part and wait for each other, and what no program may do."""

import os

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET is set, which compiles nothing", allow_module_level=True)

from triton.tools.tensor_descriptor import TensorDescriptor

from . import assembly, kernels
from .parse import EmulationError

pytestmark = pytest.mark.emulated


def zeros(count):
    return torch.zeros(count, dtype=torch.int32)


# --- control flow ----------------------------------------------------------------------------------------------------

# Each thread adds up 0 .. t % 7 - 1 in a loop of its own. Warp 0 puts 1000 t into shared memory and arrives at an
# mbarrier, warp 1 waits for that and adds what each thread finds there, warp 2 does neither.
PRODUCER = """
setp.eq.u32 %p1, %r0, 0;
@%p1 mbarrier.init.shared::cta.b64 [%r1], 32;
bar.sync 0;
rem.u32 %r3, %r0, 7;
mov.b32 %r4, 0;
mov.b32 %r5, 0;
ROUND:
setp.ge.u32 %p2, %r5, %r3;
@%p2 bra DONE;
add.u32 %r4, %r4, %r5;
add.u32 %r5, %r5, 1;
bra.uni ROUND;
DONE:
and.b32 %r6, %r0, 31;
mad.lo.u32 %r7, %r6, 4, %r1;
setp.lt.u32 %p3, %r0, 32;
@%p3 bra PRODUCES;
setp.lt.u32 %p4, %r0, 64;
@%p4 bra CONSUMES;
bra.uni TOGETHER;
PRODUCES:
mul.lo.u32 %r8, %r0, 1000;
st.shared.b32 [%r7+16], %r8;
mbarrier.arrive.shared::cta.b64 _, [%r1];
bar.sync 1, 64;
bra.uni TOGETHER;
CONSUMES:
{
.reg .pred complete;
WAIT:
mbarrier.try_wait.parity.shared::cta.b64 complete, [%r1], 0;
@!complete bra.uni WAIT;
}
ld.shared.b32 %r9, [%r7+16];
add.u32 %r4, %r4, %r9;
bar.sync 1, 64;
TOGETHER:
bar.sync 0;
mov.u32 %r10, %ctaid.x;
mad.lo.u32 %r11, %r10, 96, %r0;
mul.wide.u32 %rd2, %r11, 4;
add.u64 %rd3, %rd1, %rd2;
st.global.b32 [%rd3], %r4;
"""


def produce(body=PRODUCER):
    out = zeros(3 * 96)
    return out.view(3, 96), assembly.run(body, out, threads=96, grid=3)


def test_a_producer_warp_and_threads_of_different_lengths():
    out, launch = produce()
    t = torch.arange(96)
    rounds = t % 7
    exact = rounds * (rounds - 1) // 2 + torch.where((t >= 32) & (t < 64), 1000 * (t - 32), 0)
    assert torch.equal(out, exact.int().expand(3, 96))
    assert launch.reports == {}


WRONG_THREADS = {
    "no-arrival": ("mbarrier.arrive.shared::cta.b64 _, [%r1];\n", "", "deadlock"),
    "half-of-the-arrivals": ("[%r1], 32;", "[%r1], 64;", "deadlock"),
    "no-mbarrier": ("@%p1 mbarrier.init.shared::cta.b64 [%r1], 32;\n", "", "mbarrier that is not initialized"),
    "no-wait": ("@!complete bra.uni WAIT;\n", "", "race"),
    "the-next-phase": ("complete, [%r1], 0;", "complete, [%r1], 1;", "deadlock"),
    "no-barrier-after-the-mbarrier": ("bar.sync 0;\nrem", "rem", "race"),
    "a-warp-that-leaves": ("bra.uni TOGETHER;\nPRODUCES", "ret;\nPRODUCES", "deadlock"),
    "barriers-of-two-sizes": ("bar.sync 1, 64;\nbra", "bar.sync 1, 96;\nbra", "expect other numbers"),
    "a-barrier-for-more": ("bar.sync 1, 64;", "bar.sync 1, 96;", "deadlock"),
    "a-barrier-for-fewer": ("bar.sync 0;\nmov", "bar.sync 0, 64;\nmov", "expect other numbers|deadlock"),
    "another-barrier": ("bar.sync 1, 64;\nbra", "bar.sync 2, 64;\nbra", "deadlock"),
    "half-a-warp-at-a-barrier": ("setp.lt.u32 %p3, %r0, 32", "setp.lt.u32 %p3, %r0, 16", "a part of a warp"),
}


def complaint(run):
    """What is wrong with a launch, "" where nothing is."""
    try:
        return "\n".join(run().faults)
    except EmulationError as error:
        return str(error)


@pytest.mark.parametrize(("old", "new", "what"), WRONG_THREADS.values(), ids=WRONG_THREADS)
def test_threads_that_wait_wrongly(old, new, what):
    assert old in PRODUCER
    found = complaint(lambda: produce(PRODUCER.replace(old, new))[1])
    assert any(each in found for each in what.split("|")), found


def test_a_wait_for_the_last_phase_waits_for_no_arrival_of_this_one():
    body = PRODUCER.replace("[%r1], 32;", "[%r1], 64;").replace("complete, [%r1], 0;", "complete, [%r1], 1;")
    assert complaint(lambda: produce(body)[1]) == "shared-memory race (read)"


JOIN_BEFORE_BRANCH = """
bra.uni START;
JOIN:
bar.sync 0;
mul.wide.u32 %rd2, %r0, 4;
add.u64 %rd3, %rd1, %rd2;
st.global.b32 [%rd3], %r4;
ret;
START:
mov.b32 %r4, 1;
setp.ge.u32 %p1, %r0, 10;
@%p1 bra JOIN;
mov.b32 %r4, 2;
bra.uni JOIN;
"""


def test_threads_meet_at_a_barrier_before_the_branch_that_parted_them():
    # as compilers place it where the branch is a rare one
    out = zeros(64)
    launch = assembly.run(JOIN_BEFORE_BRANCH, out)
    assert torch.equal(out, torch.where(torch.arange(64) < 10, 2, 1).int())
    assert launch.reports == {}
    parted = JOIN_BEFORE_BRANCH.replace("mov.b32 %r4, 2;\n", "ret;\n")
    assert "a part of a warp" in complaint(lambda: assembly.run(parted, zeros(64)))


# --- memory ----------------------------------------------------------------------------------------------------------


def test_atomics_count_every_thread_once():
    # threads 8 to 63 of 100 programs, which run in several batches; each adds its number and keeps what it found
    total, found = zeros(2), zeros(100 * 64).view(100, 64)
    body = """
    setp.lt.u32 %p1, %r0, 8;
    mov.b32 %r2, -1;
    @!%p1 atom.global.gpu.acq_rel.add.u32 %r2, [%rd1+4], %r0;
    mov.u32 %r3, %ctaid.x;
    mad.lo.u32 %r4, %r3, 64, %r0;
    mul.wide.u32 %rd3, %r4, 4;
    add.u64 %rd4, %rd2, %rd3;
    st.global.b32 [%rd4], %r2;
    """
    launch = assembly.run(body, total, found, grid=100)
    added = torch.arange(64)[8:].repeat(100)
    assert total.tolist() == [0, added.sum()]
    assert (found[:, :8] == -1).all()
    # In some order: what one leaves is what the next one finds.
    order = found[:, 8:].flatten().sort()
    assert torch.equal(order.values, torch.cat([zeros(1), added[order.indices].cumsum(0)[:-1]]))
    assert launch.reports == {}


def test_a_parameter_may_be_chosen_by_its_address():
    outs = zeros(64), zeros(64)
    body = """
    mov.b64 %rd3, by_hand_0;
    mov.b64 %rd4, by_hand_1;
    setp.lt.u32 %p1, %r0, 20;
    selp.b64 %rd5, %rd3, %rd4, %p1;
    ld.param.b64 %rd6, [%rd5];
    mul.wide.u32 %rd7, %r0, 4;
    add.u64 %rd8, %rd6, %rd7;
    mov.b32 %r2, 1;
    st.global.b32 [%rd8], %r2;
    """
    assembly.run(body, *outs)
    assert torch.equal(outs[0], (torch.arange(64) < 20).int())
    assert torch.equal(outs[1], (torch.arange(64) >= 20).int())


def copy(read, write, sizes=(100, 100)):
    x, y = torch.ones(sizes[0]), torch.empty(sizes[1])
    kernels.copy_kernel[1,](x, y, read, write, 128)
    return x, y


def test_an_element_beyond_the_end(chip):
    x, y = copy(100, 100)
    assert torch.equal(x, y)
    with pytest.raises(EmulationError, match=r"out of bounds: read of 4 bytes.*400 bytes behind the start"):
        copy(101, 100)
    with pytest.raises(EmulationError, match=r"out of bounds: write of 4 bytes.*400 bytes behind the start"):
        copy(100, 101)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_memory_that_nobody_has_written(chip, launched, dtype):
    x, y = torch.empty(100, dtype=dtype), torch.empty(100, dtype=dtype)
    x[:60] = 1
    with pytest.raises(EmulationError, match="read of uninitialized global memory"):
        kernels.copy_kernel[1,](x, y, 61, 100, 128)
    assert launched.pop().faults == ["read of uninitialized global memory"]
    kernels.copy_kernel[1,](x, y, 60, 100, 128)
    assert launched.pop().faults == []


def test_a_tile_that_nobody_has_written(hopper, launched):
    """TMA brings what is there. Rows beyond the end are not read."""
    a, b, c = (torch.empty(rows, 64, dtype=torch.float16) for rows in (72, 64, 72))
    b.fill_(1)
    a[:71] = 1
    blocks = [TensorDescriptor.from_tensor(t, [64, 64]) for t in (a, b, c)]
    with pytest.raises(EmulationError, match="read of uninitialized global memory"):
        kernels.tma_matmul_kernel[2, 1](*blocks, 64, 64, 64, 64, 1)
    a[71] = 1
    kernels.tma_matmul_kernel[2, 1](*blocks, 64, 64, 64, 64, 1)
    assert (c == 64).all()


OFFSET = "and.b32 %r2, %r0, 31;\nmad.lo.u32 %r3, %r2, 4, %r1;\nmul.wide.u32 %rd2, %r0, 4;\nadd.u64 %rd3, %rd1, %rd2;\n"
FAULTS = {
    "before-the-start": ("ld.global.b32 %r4, [%rd3+-4];", "out of bounds: read of 4 bytes"),
    "beyond-the-end": ("st.global.b32 [%rd3+4], %r0;", "out of bounds: write of 4 bytes"),
    "beyond-the-end-of-a-copy": ("cp.async.ca.shared.global [%r3], [%rd3+4], 4;", "out of bounds: asynchronous read"),
    "shared-beyond-the-end": ("st.shared.b32 [%r3+900], %r0;", "out of bounds: write of 4 bytes of shared memory"),
    "shared-before-the-start": ("ld.shared.b32 %r4, [%r3+-4];", "out of bounds: read of 4 bytes of shared memory"),
    "misaligned-vector": ("ld.global.v2.b32 {%r4, %r5}, [%rd1+4];", "misaligned read of 8 bytes"),
    "misaligned-store": ("st.global.b32 [%rd1+2], %r0;", "misaligned write of 4 bytes"),
    "misaligned-in-shared-memory": ("st.shared.v4.b32 [%r1+8], {%r0, %r0, %r0, %r0};", "misaligned write of 16 bytes"),
    "misaligned-copy": ("cp.async.cg.shared.global [%r1+8], [%rd1], 16;", "misaligned asynchronous copy"),
    "two-values-for-one-address": ("st.global.b32 [%rd1], %r0;", "different values written to one address"),
    "shared-that-nobody-wrote": ("ld.shared.b32 %r4, [%r3];", "read of uninitialized shared memory"),
    "shared-that-another-warp-writes": (
        "mad.lo.u32 %r5, %r0, 4, %r1;\nst.shared.b32 [%r5], %r0;\nxor.b32 %r6, %r0, 32;\nmad.lo.u32 %r6, %r6, 4, %r1;\n"
        "ld.shared.b32 %r7, [%r6];",
        "shared-memory race (read)",
    ),
    "shared-that-a-copy-writes": (
        "mad.lo.u32 %r5, %r0, 4, %r1;\ncp.async.ca.shared.global [%r5], [%rd3], 4;\ncp.async.commit_group;\n"
        "ld.shared.b32 %r6, [%r5];\ncp.async.wait_group 0;",
        "shared-memory race (read)",
    ),
    "a-copy-that-nobody-commits": ("cp.async.ca.shared.global [%r3], [%rd3], 4;", "cp.async that was never committed"),
    "a-shuffle-from-a-thread-that-left": (
        "setp.lt.u32 %p1, %r2, 16;\n@!%p1 bra OUT;\nshfl.sync.bfly.b32 %r4, %r2, 16, 31, -1;\nOUT:",
        "shfl from a thread that is not there",
    ),
    "a-product-of-half-a-warp": (
        "setp.lt.u32 %p1, %r2, 16;\n@%p1 mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%r4, %r5, %r6, %r7}, "
        "{%r8, %r9}, {%r10}, {%r4, %r5, %r6, %r7};",
        "a part of a warp",
    ),
    "matrices-of-half-a-warp": (
        "setp.lt.u32 %p1, %r2, 16;\n@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r4}, [%r1];",
        "a part of a warp",
    ),
}


@pytest.mark.parametrize(("body", "what"), FAULTS.values(), ids=FAULTS)
def test_what_no_program_may_do(body, what):
    assert what in complaint(lambda: assembly.run(OFFSET + body, zeros(64), shared=1024))


def test_two_values_for_one_address_of_shared_memory_are_noted():
    launch = assembly.run(OFFSET + "st.shared.b32 [%r1], %r2;", zeros(64), threads=32)
    assert [what for what, _ in launch.reports] == [
        "note: different values written to one shared address by one instruction"
    ]


# --- what is not known -----------------------------------------------------------------------------------------------

UNKNOWN = """
    sin.approx.f32 %r2, %r0
    add.rz.f32 %r2, %r0, %r0
    add.sat.s32 %r2, %r0, %r0
    add.cc.u32 %r2, %r0, %r0
    setp.lt.foo.s32 %p1, %r0, 1
    selp.foo.b32 %r2, %r0, %r1, %p1
    mov.foo.b32 %r2, %r0
    mov.u32 %r2, %clock
    cvt.foo.f32.s32 %r2, %r0
    cvt.rm.f32.s32 %r2, %r0
    cvt.sat.s8.s32 %r2, %r0
    cvt.rn.f32.e4m3 %r2, %r0
    lop3.foo.b32 %r2, %r0, %r0, %r0, 1
    prmt.b32.f4e %r2, %r0, %r0, 1
    ex2.approx.f16 %rs2, %rs1
    atom.global.add.u32 %r2, [%rd1], %r0
    ld.global.foo.b32 %r2, [%rd1]
    ld.volatile.global.b32 %r2, [%rd1]
    ld.global.v2.b32 {%r2, %r3, %r4}, [%rd1]
    ld.b32 %r2, [%rd1]
    st.global.foo.b32 [%rd1], 1
    bar.arrive 1, 64
    bar.sync.foo 0
    bar.red.popc.u32 %r2, 0, %p1
    barrier.cluster.arrive
    shfl.bfly.b32 %r2, %r0, 1, 31
    shfl.sync.bfly.foo.b32 %r2, %r0, 1, 31, -1
    vote.sync.ballot.foo.b32 %r2, %p2, -1
    match.any.sync.b32 %r2, %r0, -1
    redux.sync.add.foo.s32 %r2, %r0, -1
    elect.foo %r2|%p1, -1
    fence.foo
    fence.proxy.tensormap::generic.acquire.gpu [%rd1], 128
    mbarrier.arrive_drop.shared::cta.b64 _, [%r1]
    mbarrier.init.foo.shared::cta.b64 [%r1], 1
    mbarrier.try_wait.shared::cta.b64 %p1, [%r1], %rd2
    cp.async.ca.foo.global [%r1], [%rd1], 16
    cp.async.wait_group.foo 0
    cp.async.mbarrier.arrive.shared.b64 [%r1]
    cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%rd1, {%r2, %r3, %r4}], [%r1]
    cp.reduce.async.bulk.global.shared::cta.bulk_group.add.u32 [%rd1], [%r1], 16
    ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r2, %r3}, [%r1]
    ldmatrix.sync.aligned.m8n8.x2.foo.shared.b16 {%r2, %r3}, [%r1]
    mma.sync.aligned.m16n8k8.row.row.f32.bf16.bf16.f32 {%r2, %r3, %r4, %r5}, {%r6, %r7}, {%r8}, {%r2, %r3, %r4, %r5}
    mma.sync.aligned.m16n8k8.row.col.f16.f16.f16.f16 {%r2, %r3}, {%r6, %r7}, {%r8}, {%r2, %r3}
    mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r2, %r3}, {%r6, %r7}, {%r8}, {%r2, %r3}
    wgmma.fence.foo
    wgmma.mma_async.sync.aligned.m64n8k32.f32.e4m3.e4m3 {%r2, %r3, %r4, %r5}, %rd1, %rd2, %p1, 1, 1
"""


@pytest.mark.parametrize("line", UNKNOWN.strip().splitlines(), ids=str.strip)
def test_what_is_not_known_is_refused(line):
    with pytest.raises(NotImplementedError, match="line"):
        assembly.run(line + ";", zeros(64))
