# pyright: reportCallIssue=false, reportGeneralTypeIssues=false
# Launch options (num_warps) and loops over tl.range are not in triton's types.
"""y = act(x @ weight.T + bias) and its backward in Triton: the kernels and their launchers.

Shapes: x (M, K), weight (N, K), bias (N,), y and dy (M, N). Any strides in; fresh contiguous tensors out. All
arithmetic is fp32; 16-bit operands enter the tensor cores as they are, except in the interpreter, whose 16-bit
dot is wrong, where they are widened right after the load.

The contraction over the batch is written `dot(trans(x), dz)` with x straight from memory. The other order,
`dot(trans(dz), x)`, transposes a register tensor that came from a dot once kernels chain layers. On Hopper that was
reported to compute wrong numbers with triton 3.4 to 3.7.1 (flash-linear-attention #640, #826, #988). The PTX of 3.6.0
and 3.7.1 is right; the assembler in their wheels may overwrite registers that such a product has still to read, which
CUDA 13.3 mended (triton-lang/triton #11781). Compile-only tests look for both in every kernel.
"""

import contextlib
import threading
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction

from . import device
from .records import NotCompiledError, Plan


@triton.jit
def _operand(a, PRECISION: tl.constexpr, WIDEN: tl.constexpr):
    r = device.operand(a, PRECISION)
    return r.to(tl.float32) if WIDEN else r


@triton.jit(do_not_specialize=["M"])
def linear_act_fwd_rows_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,  # None without a bias
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_b,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # >= N
    BLOCK_K: tl.constexpr,  # >= K
    STAGES: tl.constexpr,
):
    """Narrow layers: the whole weight stays on chip and each program walks row tiles."""
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask_k = offs_k < K
    # The weight is loaded as its transpose: a stride order, not a copy.
    wt = tl.load(
        weight_ptr + offs_k.to(tl.int64)[:, None] * stride_wk + offs_n.to(tl.int64)[None, :] * stride_wn,
        mask=mask_k[:, None] & mask_n[None, :],
        other=0.0,
    )  # [BLOCK_K, BLOCK_N]
    wt = _operand(wt, PRECISION, WIDEN)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + offs_n.to(tl.int64) * stride_b, mask=mask_n, other=0.0).to(tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        offs_m = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        x = tl.load(
            x_ptr + offs_m[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk,
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        z = tl.dot(_operand(x, PRECISION, WIDEN), wt, input_precision=PRECISION)
        if bias_ptr is not None:
            z += bias[None, :]
        tl.store(
            y_ptr + offs_m[:, None] * N + offs_n[None, :],
            ACT(z).to(y_ptr.dtype.element_ty),
            mask=mask_m[:, None] & mask_n[None, :],
        )


@triton.jit(do_not_specialize=["M"])
def linear_act_fwd_tiled_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,  # None without a bias
    y_ptr,
    M,
    N,
    K,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_b,
    ACT: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Any shape: one output tile per program, a loop over K, groups of 8 row tiles so that weights stay in L2."""
    num_m = tl.cdiv(M, BLOCK_M)
    num_n = tl.cdiv(N, BLOCK_N)
    group = tl.program_id(0) // (8 * num_n)
    group_m = tl.minimum(num_m - group * 8, 8)
    in_group = tl.program_id(0) % (8 * num_n)
    tile_m = group * 8 + in_group % group_m
    tile_n = in_group // group_m

    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m < M
    mask_n = offs_n < N
    x_ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_k[None, :] * stride_xk
    wt_ptrs = weight_ptr + offs_k[:, None] * stride_wk + offs_n[None, :] * stride_wn
    # 64-bit steps: BLOCK_K * stride alone may pass 2^31 for a transposed operand.
    step_x = tl.full((), BLOCK_K, tl.int64) * stride_xk
    step_w = tl.full((), BLOCK_K, tl.int64) * stride_wk
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        mask_k = offs_k < K - k
        x = tl.load(x_ptrs, mask=mask_m[:, None] & mask_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        wt = tl.load(wt_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(_operand(x, PRECISION, WIDEN), _operand(wt, PRECISION, WIDEN), acc, input_precision=PRECISION)
        x_ptrs += step_x
        wt_ptrs += step_w
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n * stride_b, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + offs_m[:, None] * N + offs_n[None, :],
        ACT(acc).to(y_ptr.dtype.element_ty),
        mask=mask_m[:, None] & mask_n[None, :],
    )


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["dbias_ptr"])
def linear_act_bwd_rows_kernel(
    dy_ptr,
    y_ptr,
    x_ptr,  # None without dweight
    weight_ptr,  # None without dx
    dx_ptr,  # None: not wanted
    dweight_ptr,  # None: not wanted; else one slot per program
    dbias_ptr,  # None: not wanted; else one slot per program
    M,
    N,
    K,
    stride_dym,
    stride_dyn,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_slot,  # elements between the slots of two programs
    ACT_BACKWARD: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,  # >= N
    BLOCK_K: tl.constexpr,  # >= K
    STAGES: tl.constexpr,
):
    """Narrow layers: dx, dweight and dbias from one read of dy, y and x.

    Every program sums its row tiles in registers, in the order of the rows, and writes its sums to a slot of
    its own; no atomics, so the same input gives the same bits.
    """
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < N
    mask_k = offs_k < K
    if dx_ptr is not None:
        w = tl.load(
            weight_ptr + offs_n.to(tl.int64)[:, None] * stride_wn + offs_k.to(tl.int64)[None, :] * stride_wk,
            mask=mask_n[:, None] & mask_k[None, :],
            other=0.0,
        )  # [BLOCK_N, BLOCK_K]
        w = _operand(w, PRECISION, WIDEN)
    if dweight_ptr is not None:
        dwt = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    if dbias_ptr is not None:
        db = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0), num_stages=STAGES):
        offs_m = tl.cast(tile, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask_mn = mask_m[:, None] & mask_n[None, :]
        dy = tl.load(
            dy_ptr + offs_m[:, None] * stride_dym + offs_n.to(tl.int64)[None, :] * stride_dyn, mask=mask_mn, other=0.0
        ).to(tl.float32)
        y = tl.load(y_ptr + offs_m[:, None] * N + offs_n[None, :], mask=mask_mn, other=0.0).to(tl.float32)
        dz = ACT_BACKWARD(dy, y)  # [BLOCK_M, BLOCK_N]
        if dbias_ptr is not None:
            db += tl.sum(dz, axis=0)
        dz = device.operand(dz if WIDEN else dz.to(y_ptr.dtype.element_ty), PRECISION)
        if dweight_ptr is not None:
            x = tl.load(
                x_ptr + offs_m[:, None] * stride_xm + offs_k.to(tl.int64)[None, :] * stride_xk,
                mask=mask_m[:, None] & mask_k[None, :],
                other=0.0,
            )  # [BLOCK_M, BLOCK_K]
            dwt = tl.dot(tl.trans(_operand(x, PRECISION, WIDEN)), dz, dwt, input_precision=PRECISION)
        if dx_ptr is not None:
            dx = tl.dot(dz, w, input_precision=PRECISION)  # [BLOCK_M, BLOCK_K]
            tl.store(
                dx_ptr + offs_m[:, None] * K + offs_k[None, :],
                dx.to(dx_ptr.dtype.element_ty),
                mask=mask_m[:, None] & mask_k[None, :],
            )
    slot = tl.program_id(0).to(tl.int64) * stride_slot
    if dweight_ptr is not None:
        # Stored as (N, K), the layout of the parameter.
        tl.store(
            dweight_ptr + slot + offs_n[None, :] * K + offs_k[:, None],
            dwt.to(dweight_ptr.dtype.element_ty),
            mask=mask_k[:, None] & mask_n[None, :],
        )
    if dbias_ptr is not None:
        tl.store(dbias_ptr + slot + offs_n, db.to(dbias_ptr.dtype.element_ty), mask=mask_n)


@triton.jit(do_not_specialize=["M"])
def act_bwd_kernel(
    dy_ptr,
    y_ptr,
    dz_ptr,
    dbias_ptr,  # None: not wanted; else one slot of N per row tile
    M,
    N,
    stride_dym,
    stride_dyn,
    ACT_BACKWARD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Wide layers: dz = dy * act'(y) and the column sums of each row tile, in one pass."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    dy = tl.load(dy_ptr + offs_m[:, None] * stride_dym + offs_n[None, :] * stride_dyn, mask=mask, other=0.0)
    y = tl.load(y_ptr + offs_m[:, None] * N + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    dz = ACT_BACKWARD(dy.to(tl.float32), y)
    tl.store(dz_ptr + offs_m[:, None] * N + offs_n[None, :], dz.to(dz_ptr.dtype.element_ty), mask=mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + tl.program_id(0).to(tl.int64) * N + offs_n, tl.sum(dz, axis=0), mask=offs_n < N)


@triton.jit(do_not_specialize=["num_slots"])
def sum_slots_kernel(
    slots_ptr,
    first_ptr,
    second_ptr,  # None: the slots hold the first tensor only
    num_slots,
    first_size,
    size,
    BLOCK: tl.constexpr,
):
    """out[i] = slots[0, i] + slots[1, i] + ... in a fixed order; the first `first_size` sums go to the first tensor."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    # Four running sums hide the latency of the loads; which slot joins which sum depends on num_slots alone.
    acc = tl.zeros((4, BLOCK), dtype=tl.float32)
    lane = tl.arange(0, 4)
    for slot in range(0, num_slots, 4):
        rows = (slot + lane).to(tl.int64)
        acc += tl.load(
            slots_ptr + rows[:, None] * size + offs[None, :],
            mask=(rows < num_slots)[:, None] & mask[None, :],
            other=0.0,
        )
    total = tl.sum(acc, axis=0)
    tl.store(first_ptr + offs, total.to(first_ptr.dtype.element_ty), mask=mask & (offs < first_size))
    if second_ptr is not None:
        tl.store(
            second_ptr + offs - first_size, total.to(second_ptr.dtype.element_ty), mask=mask & (offs >= first_size)
        )


INTERPRETED = not isinstance(linear_act_fwd_rows_kernel, JITFunction)


def _current(tensor: Tensor):
    # Triton launches on the current device, whatever the tensors' own.
    if not tensor.is_cuda:
        return contextlib.nullcontext()
    if torch.cuda.is_current_stream_capturing():
        return _captured(tensor.device)
    if tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


# Private: without it, a cold capture ends in triton's own error.
_compile = getattr(JITFunction, "_do_compile", None)
_lock = threading.Lock()
_captures = 0  # launches into captures that are going on, of all threads


@contextlib.contextmanager
def _captured(place: torch.device):
    # A kernel that had to be compiled and loaded now would spoil the capture, with an error that does not say so.
    global _captures
    with torch.cuda.device(place):
        if _compile is None:
            yield
            return
        with _lock:
            _captures += 1
            JITFunction._do_compile = _refuse_to_compile  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            with _lock:
                _captures -= 1
                if not _captures:
                    JITFunction._do_compile = _compile


def _refuse_to_compile(kernel, *arguments):
    # Threads that capture nothing go on compiling.
    if _compile is not None and not torch.cuda.is_current_stream_capturing():
        return _compile(kernel, *arguments)
    raise NotCompiledError(
        f"{kernel.__name__} is not compiled yet, and cannot be while a CUDA graph is captured: before that, take one "
        "step with the same shapes, dtypes and strides, or give it to perceptriton.mlp.warmup"
    )


_runners: dict[tuple, tuple[object, int, Callable[..., object]]] = {}
MAX_RUNNERS = 4096


def aligned(*tensors: Tensor | None) -> bool:
    """Whether all begin at multiples of 16 bytes, as those that torch allocates do."""
    addresses = 0
    for tensor in tensors:
        if tensor is not None:
            addresses |= tensor.data_ptr()
    return not addresses % 16


def launch(kernel, grid: tuple[int, ...], owner: object, known: tuple | None, /, **arguments: object) -> None:
    """kernel[grid](**arguments), the arguments in the order of the signature and launch options after them.

    At every launch triton looks at each argument in order to find the compiled version for it, which on the host takes
    longer than everything else that a small layer does. What it found is kept here and called from then on.

    known: all that it depends on (device, dtypes, None or not, every integer, every constant), and the grid does, given
    that all tensors are `aligned`; None where they are not. owner: kept as long as `known` is, which holds its id.
    """
    if known is None:
        kernel[grid](**arguments)
        return
    key = (id(kernel), id(owner), known)
    if found := _runners.get(key):
        _, count, run = found
        run(*list(arguments.values())[:count])
        return
    compiled = kernel[grid](**arguments)
    # The interpreter returns nothing, and what only stands for a kernel, as in tests, wants to see every launch.
    if isinstance(compiled, CompiledKernel) and isinstance(kernel, JITFunction):
        if len(_runners) >= MAX_RUNNERS:
            _runners.clear()
        _runners[key] = owner, len(kernel.arg_names), compiled[(*grid, 1, 1)[:3]]


def linear_act_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, plan: Plan) -> Tensor:
    """act(x @ weight.T + bias), (M, N), in the dtype of x; M and N are not 0."""
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty((M, N), dtype=x.dtype, device=x.device)
    tile = plan.tile
    kernel = linear_act_fwd_rows_kernel if plan.impl == "rows" else linear_act_fwd_tiled_kernel
    known = None
    if aligned(x, weight, bias):
        operands = [t if t is None else (t.device, t.dtype, t.stride()) for t in (x, weight, bias)]
        known = (activation, M, N, K, *operands)
    with _current(x):
        launch(
            kernel,
            (plan.programs,),
            plan,
            known,
            x_ptr=x,
            weight_ptr=weight,
            bias_ptr=bias,
            y_ptr=y,
            M=M,
            N=N,
            K=K,
            stride_xm=x.stride(0),
            stride_xk=x.stride(1),
            stride_wn=weight.stride(0),
            stride_wk=weight.stride(1),
            stride_b=1 if bias is None else bias.stride(0),
            ACT=device.ACTIVATIONS[activation][0],
            PRECISION=plan.precision,
            WIDEN=INTERPRETED,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            STAGES=tile.num_stages,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
    return y


def linear_act_bwd(
    dy: Tensor,
    y: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    activation: str,
    wanted: tuple[bool, bool, bool],
    plan: Plan,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dx, dweight, dbias), None where not wanted. x may be None without dweight, weight without dx."""
    if plan.impl == "rows":
        return _linear_act_bwd_rows(dy, y, x, weight, activation, wanted, plan)
    need_dx, need_dweight, need_dbias = wanted
    dz, dbias = act_bwd(dy, y, activation, need_dbias, plan)
    dx = torch.mm(dz, weight) if need_dx and weight is not None else None
    dweight = torch.mm(dz.t(), x) if need_dweight and x is not None else None
    return dx, dweight, dbias


def _linear_act_bwd_rows(
    dy: Tensor,
    y: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    activation: str,
    wanted: tuple[bool, bool, bool],
    plan: Plan,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """One kernel and, with several programs, one reduction."""
    M, N = y.shape
    K = weight.shape[1] if weight is not None else x.shape[1] if x is not None else 1
    tile = plan.tile
    need_dx, need_dweight, need_dbias = wanted
    dx = y.new_empty((M, K)) if need_dx else None
    dweight = y.new_empty((N, K)) if need_dweight else None
    dbias = y.new_empty((N,)) if need_dbias else None
    # One program writes the gradients themselves; several write fp32 slots that are then summed.
    size = (N * K if need_dweight else 0) + (N if need_dbias else 0)
    slots = None
    dweight_slots, dbias_slots = dweight, dbias
    if plan.programs > 1 and size:
        slots = torch.empty((plan.programs, size), dtype=torch.float32, device=y.device)
        dweight_slots = slots if need_dweight else None
        dbias_slots = slots[:, size - N :] if need_dbias else None
    known = None
    if aligned(dy, y, x, weight):
        operands = [t if t is None else (t.device, t.dtype, t.stride()) for t in (y, dy, x, weight)]
        known = (activation, M, N, K, *operands, wanted)
    with _current(y):
        launch(
            linear_act_bwd_rows_kernel,
            (plan.programs,),
            plan,
            known,
            dy_ptr=dy,
            y_ptr=y,
            x_ptr=x if need_dweight else None,
            weight_ptr=weight if need_dx else None,
            dx_ptr=dx,
            dweight_ptr=dweight_slots,
            dbias_ptr=dbias_slots,
            M=M,
            N=N,
            K=K,
            stride_dym=dy.stride(0),
            stride_dyn=dy.stride(1),
            stride_xm=x.stride(0) if x is not None else 0,
            stride_xk=x.stride(1) if x is not None else 0,
            stride_wn=weight.stride(0) if weight is not None else 0,
            stride_wk=weight.stride(1) if weight is not None else 0,
            stride_slot=size,
            ACT_BACKWARD=device.ACTIVATIONS[activation][1],
            PRECISION=plan.precision,
            WIDEN=INTERPRETED,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK_K=tile.block_k,
            STAGES=tile.num_stages,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            enable_fp_fusion=True,
        )
        if slots is not None:
            _sum_slots(slots, *(g for g in (dweight, dbias) if g is not None))
    return dx, dweight, dbias


def act_bwd(dy: Tensor, y: Tensor, activation: str, need_dbias: bool, plan: Plan) -> tuple[Tensor, Tensor | None]:
    """(dz, dbias): dz = dy * act'(y), (M, N), and its column sums, (N,), or None."""
    M, N = y.shape
    tile = plan.tile
    dz = torch.empty((M, N), dtype=y.dtype, device=y.device)
    grid = (-(-M // tile.block_m), -(-N // tile.block_n))  # triton.cdiv is typed as device code
    slots = torch.empty((grid[0], N), dtype=torch.float32, device=y.device) if need_dbias else None
    dbias = torch.empty((N,), dtype=y.dtype, device=y.device) if need_dbias else None
    known = None
    if aligned(dy, y):
        known = (y.device, y.dtype, dy.device, dy.dtype, activation, M, N, dy.stride(), need_dbias)
    with _current(y):
        launch(
            act_bwd_kernel,
            grid,
            plan,
            known,
            dy_ptr=dy,
            y_ptr=y,
            dz_ptr=dz,
            dbias_ptr=slots,
            M=M,
            N=N,
            stride_dym=dy.stride(0),
            stride_dyn=dy.stride(1),
            ACT_BACKWARD=device.ACTIVATIONS[activation][1],
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            num_warps=tile.num_warps,
            enable_fp_fusion=True,
        )
        if slots is not None and dbias is not None:
            _sum_slots(slots, dbias, None)
    return dz, dbias


def _sum_slots(slots: Tensor, first: Tensor, second: Tensor | None = None) -> None:
    num_slots, size = slots.shape
    known = None
    if aligned(slots, first, second):
        known = (slots.device, first.dtype, num_slots, size, first.numel(), second is None)
    launch(
        sum_slots_kernel,
        (-(-size // SUM_BLOCK),),
        None,
        known,
        slots_ptr=slots,
        first_ptr=first,
        second_ptr=second,
        num_slots=num_slots,
        first_size=first.numel(),
        size=size,
        BLOCK=SUM_BLOCK,
        num_warps=SUM_WARPS,
        enable_fp_fusion=True,
    )


SUM_BLOCK, SUM_WARPS = 64, 2
