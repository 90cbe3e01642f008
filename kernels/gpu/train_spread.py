# SPDX-License-Identifier: Apache-2.0
"""The block kernel for large batches: several programs for one network, one step per launch. See `train.py`."""

# triton's types know neither launch options nor tl.range.
# pyright: reportCallIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false, reportReturnType=false
# pyright: reportArgumentType=false, reportOptionalMemberAccess=false, reportOptionalSubscript=false
# pyright: reportPossiblyUnboundVariable=false

import triton
import triton.language as tl

from .train_block import (
    block_accumulate,
    block_backward,
    block_forward,
    block_load,
    block_losses,
    block_rows,
    block_store,
    block_targets,
)
from .train_rules import UNALIGNED, UNSPECIALIZED, own_number, own_numbers, step_number, update


@triton.jit
def _slot_offsets(i, SIZES: tl.constexpr, WIDTHS: tl.constexpr, PADDED: tl.constexpr):
    """Offsets of parameter i's padded elements in a slot."""
    l: tl.constexpr = i // 2 if len(SIZES) >= len(WIDTHS) else i
    offs_n = tl.arange(0, PADDED[l + 1])
    if len(SIZES) >= len(WIDTHS) and i % 2 == 1:
        return offs_n
    else:  # noqa: RET505, the compiler wants both
        return offs_n[:, None] * PADDED[l] + tl.arange(0, PADDED[l])[None, :]


@triton.jit(
    do_not_specialize=[name for name in UNSPECIALIZED if name != "steps"], do_not_specialize_on_alignment=UNALIGNED
)
def train_spread_kernel(
    parameter_ptrs,  # all arguments as for train_lane_kernel, but for slots, progress and the last lines
    first_ptrs,
    second_ptrs,
    lr_ptr,
    factors_ptr,
    x_ptr,
    y_ptr,
    order_ptr,
    losses_ptr,
    slots_ptr,  # (members, programs, SLOT): the gradient by each program's samples, padded, and their loss
    progress_ptr,  # (members, 2): programs that are done with this step; steps since both were 0
    members,
    samples,
    stride_xe,
    stride_ye,
    stride_ls,
    stride_le,
    stride_fs,
    stride_fe,
    batch_size,
    batches,
    batch,
    scale,
    last_scale,
    beta,
    taken,
    offset,
    period,
    weight_decay,
    hyper,
    HIDDEN: tl.constexpr,
    HIDDEN_BACKWARD: tl.constexpr,
    OUTPUT: tl.constexpr,
    OUTPUT_BACKWARD: tl.constexpr,
    SUMS: tl.constexpr,
    LOSS: tl.constexpr,
    DZ: tl.constexpr,
    NUMBERS: tl.constexpr,
    UPDATE: tl.constexpr,
    DECOUPLED: tl.constexpr,
    WIDTHS: tl.constexpr,
    TARGETS: tl.constexpr,
    SIZES: tl.constexpr,
    PADDED: tl.constexpr,
    STARTS: tl.constexpr,  # where each parameter begins in a slot, and where the loss is
    SLOT: tl.constexpr,
    UNROLL: tl.constexpr,  # slots that are on their way together
    BLOCK_M: tl.constexpr,
):
    """Each program goes through every programs-th tile of a batch; the last one to be done takes the step.

    No program waits for another, so it does not matter which of them run at the same time.
    """
    LAYERS: tl.constexpr = len(WIDTHS) - 1
    BIAS: tl.constexpr = len(SIZES) > LAYERS
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    member = tl.program_id(1).to(tl.int64)
    x_ptr += member * stride_xe
    y_ptr += member * stride_ye
    slots_ptr += member * programs * SLOT
    progress_ptr += member * 2
    step = tl.load(progress_ptr + 1)
    if order_ptr is not None:
        order_ptr += ((batch + step) // batches).to(tl.int64) * samples
    batch = (batch + step) % batches
    batch_scale = tl.where(batch == batches - 1, last_scale, scale)
    batch_scale = step_number(batch_scale, factors_ptr, stride_fs, stride_fe, step, member)
    logged = (offset + step) % period == 0
    params = block_load(parameter_ptrs, member, True, SIZES, WIDTHS, PADDED)
    grads = ()
    for i in tl.static_range(len(params)):
        grads = grads + (tl.zeros(params[i].shape, tl.float32),)
    loss = tl.full((), 0.0, tl.float32)
    first_row = batch * batch_size
    end_row = tl.minimum(first_row + batch_size, samples)
    for row_start in tl.range(first_row + program * BLOCK_M, end_row, programs * BLOCK_M, num_stages=1):
        x, _ = block_rows(x_ptr, order_ptr, row_start, end_row, WIDTHS[0], WIDTHS[0], PADDED[0], BLOCK_M)
        t, inside = block_targets(
            y_ptr, order_ptr, row_start, end_row, WIDTHS[LAYERS], TARGETS, PADDED[LAYERS], BLOCK_M
        )
        hs, z = block_forward(params, x, HIDDEN, OUTPUT, WIDTHS, PADDED, BIAS)
        if logged:
            loss += block_losses(z, hs[LAYERS], t, inside, beta, SUMS, LOSS)
        dzs = block_backward(
            params, hs, z, t, inside, beta, batch_scale, HIDDEN_BACKWARD, OUTPUT_BACKWARD, SUMS, DZ, BIAS
        )
        grads = block_accumulate(grads, hs, dzs, LAYERS, BIAS)

    own_ptr = slots_ptr + program * SLOT
    for i in tl.static_range(len(params)):
        tl.store(own_ptr + STARTS[i] + _slot_offsets(i, SIZES, WIDTHS, PADDED), grads[i])
    tl.store(own_ptr + STARTS[len(params)], loss)
    # One thread alone counts the program, and what the others have stored must be there before.
    tl.debug_barrier()
    done = tl.atomic_add(progress_ptr, 1, sem="acq_rel", scope="gpu")
    if done == programs - 1:
        sums = ()
        for i in tl.static_range(len(params)):
            sums = sums + (tl.zeros(params[i].shape, tl.float32),)
        total = tl.full((), 0.0, tl.float32)
        # In the order of the programs, whichever was the last one.
        for first in tl.range(0, programs, UNROLL, num_stages=1):
            for j in tl.static_range(UNROLL):
                added = ()
                slot_ptr = slots_ptr + (first + j) * SLOT
                there = first + j < programs
                for i in tl.static_range(len(params)):
                    offs = _slot_offsets(i, SIZES, WIDTHS, PADDED)
                    mask = tl.full(offs.shape, True, tl.int1) & there
                    # Not by way of this multiprocessor's own cache.
                    slot = tl.load(slot_ptr + STARTS[i] + offs, mask=mask, other=0.0, cache_modifier=".cg")
                    added = added + (sums[i] + slot,)
                sums = added
                total += tl.load(slot_ptr + STARTS[len(params)], mask=there, other=0.0, cache_modifier=".cg")
        decay = None if weight_decay is None else own_number(weight_decay, member)
        own_hyper = own_numbers(hyper, member)
        lr = tl.load(lr_ptr + member) if stride_ls is None else None
        rate = step_number(lr, lr_ptr, stride_ls, stride_le, step, member)
        firsts = block_load(first_ptrs, member, taken + step > 0, SIZES, WIDTHS, PADDED)
        seconds = block_load(second_ptrs, member, taken + step > 0, SIZES, WIDTHS, PADDED)
        params, firsts, seconds = update(
            params, firsts, seconds, sums, rate, decay, taken + step + 1, own_hyper, NUMBERS, UPDATE, DECOUPLED
        )
        block_store(parameter_ptrs, params, member, SIZES, WIDTHS, PADDED)
        if first_ptrs is not None:
            block_store(first_ptrs, firsts, member, SIZES, WIDTHS, PADDED)
        if second_ptrs is not None:
            block_store(second_ptrs, seconds, member, SIZES, WIDTHS, PADDED)
        if logged:
            row = ((offset + step) // period - tl.where(offset > 0, 1, 0)).to(tl.int64)
            tl.store(losses_ptr + row * members + member, total * batch_scale)
        tl.store(progress_ptr, 0)
        tl.store(progress_ptr + 1, step + 1)
