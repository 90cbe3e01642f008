# SPDX-License-Identifier: Apache-2.0
"""y = act(x @ weight.T + bias) and its backward in plain torch: the definition of correct, and the CPU path.

Shapes: x (M, K), weight (N, K), bias (N,), y and dy (M, N). With dz = dy * act'(y):

    dx = dz @ weight        dweight = dz.T @ x        dbias = sum of dz over the rows

A network is a chain of such layers, the dx of one being the dy of the layer below.
"""

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .activations import ACTIVATIONS
from .records import MlpPlan, NeedsGrad, Plan, Wanted
from .trial import undisturbed

OptionalTensors = Sequence[Tensor | None]
Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]  # dx, dweight, dbias


@functools.cache
@undisturbed
def onednn_linear():
    """oneDNN's product x @ weight.T + bias with a fused activation, or None where this torch has none that works.

    `torch.ops.mkldnn._linear_pointwise` is private, so it is tried once against torch's own product. It reads a
    strided bias as if it were dense, refuses matrices whose elements may share memory, its relu drops NaN, and it takes
    fp32 and bf16 only: callers see to that.
    """
    try:
        linear = torch.ops.mkldnn._linear_pointwise.default
        # The trial names its device and dtype, because a process may have set other defaults.
        x = torch.eye(3, 4, dtype=torch.float32, device="cpu")
        weight = torch.arange(8, dtype=torch.float32, device="cpu").view(2, 4)
        bias = x.new_tensor([0.5, -0.5])
        for post_op, function in (("none", torch.clone), ("sigmoid", torch.sigmoid), ("tanh", torch.tanh)):
            want = function(torch.addmm(bias, x, weight.t()))
            if not torch.allclose(linear(x, weight, bias, post_op, [], ""), want, atol=1e-6):
                return None
        return linear
    except Exception:  # a private function may raise anything; without it this path uses another product
        return None


def shares_nothing(tensor: Tensor) -> bool:
    """Whether strides alone tell that no two elements share memory: each dimension steps over all of those within it.

    They do not where dimensions are woven into each other, as in every other column of a matrix of odd width.
    """
    span = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride < span:
                return False
            span = stride * size
    return True


def _apart(matrix: Tensor) -> Tensor:
    """The matrix, or a copy where elements may share memory, as those of sliding windows do: oneDNN refuses it."""
    return matrix if shares_nothing(matrix) else matrix.contiguous()


def linear_act_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, plan: Plan) -> Tensor:
    """act(x @ weight.T + bias), (M, N), in the dtype of x."""
    act = ACTIVATIONS[activation]
    onednn = onednn_linear() if plan.forward_gemm == "onednn" else None
    if onednn is not None:
        if bias is not None and not bias.is_contiguous():
            bias = bias.contiguous()
        y = onednn(_apart(x), _apart(weight), bias, act.post_op, [], "")
        return y if act.post_op != "none" else act.forward_(y)
    z = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    return act.forward_(z)


def linear_act_bwd(
    dy: Tensor, y: Tensor, x: Tensor | None, weight: Tensor | None, activation: str, wanted: Wanted, plan: Plan
) -> Gradients:
    """(dx, dweight, dbias), None where not wanted. x may be None without dweight, weight without dx."""
    need_dx, need_dweight, need_dbias = wanted
    if not 0 < plan.chunk < dy.shape[0]:
        # One layer in one piece takes a short way: for a small layer the bookkeeping costs as much as the arithmetic.
        dz = ACTIVATIONS[activation].backward(dy, y)
        return (
            _product(dz, weight, plan.dx_gemm) if need_dx and weight is not None else None,
            _summed(_add_dweight(None, dz, x, plan, dz.dtype)) if need_dweight and x is not None else None,
            dz.sum(0) if need_dbias else None,
        )
    network = MlpPlan("explicit", plan.reason, layers=(plan,), chunk=plan.chunk)
    flags = (need_dx, (need_dweight,), (need_dbias,))
    dx, (dweight,), (dbias,) = mlp_bwd(dy, x, (y,), (weight,), activation, activation, flags, network)
    return dx, dweight, dbias


def linear_act_bwd_differentiable(
    dy: Tensor, y: Tensor, x: Tensor | None, weight: Tensor | None, activation: str, wanted: Wanted
) -> Gradients:
    """The same gradients from differentiable operations, for any leading dimensions: what create_graph needs."""
    need_dx, need_dweight, need_dbias = wanted
    dz = ACTIVATIONS[activation].backward(dy, y)  # torch knows the derivatives of its own operation
    flat = dz.reshape(math.prod(dz.shape[:-1]), dz.shape[-1])
    return (
        torch.matmul(dz, weight) if need_dx and weight is not None else None,
        torch.mm(flat.t(), x.reshape(flat.shape[0], x.shape[-1])) if need_dweight and x is not None else None,
        flat.sum(0) if need_dbias else None,
    )


# --- whole networks ----------------------------------------------------------------------------------------


def mlp_fwd(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] | None,
    hidden: str,
    output: str,
    plan: MlpPlan,
    save: tuple[int, ...] = (),
    layer: Callable[[Tensor, Tensor, Tensor | None, str, Plan], Tensor] = linear_act_fwd,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(y, saved): the output of the last layer and the inputs of the layers l in `save`; l = len(weights) is y.

    layer: what runs a layer by its own plan.
    """
    h, last, kept = x, len(weights) - 1, {}
    for l, weight in enumerate(weights):
        bias = None if biases is None else biases[l]
        h = layer(h, weight, bias, output if l == last else hidden, plan.layers[l])
        if l + 1 in save:
            kept[l + 1] = h
    return h, tuple(kept[l] for l in save)


def first_wanted(wanted: NeedsGrad) -> int:
    """The first layer of which any gradient is wanted: below it, none need be known."""
    need_dx, need_dweights, need_dbiases = wanted
    flags = zip(need_dweights, need_dbiases, strict=True)
    return next((l for l, layer in enumerate(flags) if need_dx or any(layer)), len(need_dweights))


def mlp_bwd(
    dy: Tensor,
    x: Tensor | None,
    saved: OptionalTensors,
    weights: OptionalTensors,
    hidden: str,
    output: str,
    wanted: NeedsGrad,
    plan: MlpPlan,
) -> tuple[Tensor | None, OptionalTensors, OptionalTensors]:
    """(dx, dweights, dbiases), None where not wanted. saved: the outputs of all layers, y last.

    None will do for what no gradient needs: x without the first dweight, a weight that no dz passes on its way down to
    `first_wanted`, the outputs of the layers below that one but for the input of its dweight, y of an identity.
    """
    need_dx, need_dweights, need_dbiases = wanted
    m, layers = dy.shape[0], range(len(weights))
    hs = (x, *saved)
    acts = [ACTIVATIONS[output if l == layers[-1] else hidden] for l in layers]
    first = first_wanted(wanted)
    chunk = min(plan.chunk or m, m)
    dx = dy.new_empty((m, weights[0].shape[1])) if need_dx and weights[0] is not None and chunk < m else None
    dweights: list[Tensor | None] = [None for _ in layers]
    dbiases: list[Tensor | None] = [None for _ in layers]
    # Sums over several pieces are kept in fp32 whatever the dtype.
    sums = torch.float32 if chunk < m else dy.dtype
    for start in range(0, max(m, 1), max(chunk, 1)):  # without rows the loop runs once, and all gradients are 0
        rows = slice(start, min(start + chunk, m))
        dh = dy[rows]
        for l in reversed(layers[first:]):
            act, own, h, weight = acts[l], plan.layers[l], hs[l], weights[l]
            y = saved[l]
            y = dh if y is None else y[rows]
            # dy belongs to the caller; every later gradient is a fresh tensor, which may be written over.
            dz = act.backward(dh, y) if l == layers[-1] else act.backward_into(dh, y, dh)
            if need_dweights[l] and h is not None:
                dweights[l] = _add_dweight(dweights[l], dz, h[rows], own, sums)
            if need_dbiases[l]:
                total = dbiases[l]
                dbias = dz.sum(0).to(sums)  # torch would copy all of dz to sum it in another dtype
                dbiases[l] = dbias if total is None else total.add_(dbias)
            if weight is not None and (l > first or need_dx):
                dh = _product(dz, weight, own.dx_gemm, dx[rows] if dx is not None and l == 0 else None)
        if need_dx and dx is None:
            dx = dh
    return dx, _finished(dweights, dy.dtype), _finished(dbiases, dy.dtype)


def mlp_bwd_differentiable(
    dhs: OptionalTensors,
    x: Tensor | None,
    saved: OptionalTensors,
    weights: OptionalTensors,
    hidden: str,
    output: str,
    wanted: NeedsGrad,
) -> tuple[Tensor | None, OptionalTensors, OptionalTensors]:
    """The same gradients from differentiable operations, for any leading dimensions: what create_graph needs.

    dhs: what reaches the outputs of all layers from outside, y last, or None: in a backward pass through gradients,
    outputs of hidden layers too. dx is (M, K). Where nothing comes from above, gradients are None.
    """
    need_dx, need_dweights, need_dbiases = wanted
    last, first = len(weights) - 1, first_wanted(wanted)
    x, *saved = (None if t is None else t.reshape(math.prod(t.shape[:-1]), t.shape[-1]) for t in (x, *saved))
    hs = (x, *saved)
    dweights: list[Tensor | None] = [None for _ in weights]
    dbiases: list[Tensor | None] = [None for _ in weights]
    dh: Tensor | None = None
    for l in range(last, first - 1, -1):
        if (outside := dhs[l]) is not None:
            outside = outside.reshape(math.prod(outside.shape[:-1]), outside.shape[-1])
            dh = outside if dh is None else dh + outside
        if dh is not None:
            y, flags = saved[l], (l > first or need_dx, need_dweights[l], need_dbiases[l])
            dh, dweights[l], dbiases[l] = linear_act_bwd_differentiable(
                dh, dh if y is None else y, hs[l], weights[l], output if l == last else hidden, flags
            )
    return dh, tuple(dweights), tuple(dbiases)


def _finished(totals: OptionalTensors, dtype: torch.dtype) -> OptionalTensors:
    return tuple(None if total is None else _summed(total).to(dtype) for total in totals)


def _product(a: Tensor, b: Tensor, gemm: str, out: Tensor | None = None) -> Tensor:
    """a @ b, written into `out` if there is one."""
    onednn = onednn_linear() if gemm == "onednn" else None
    if onednn is None:
        return torch.mm(a, b) if out is None else torch.mm(a, b, out=out)
    product = onednn(_apart(a), _apart(b).t(), None, "none", [], "")
    return product if out is None else out.copy_(product)


def _add_dweight(total: Tensor | None, dz: Tensor, h: Tensor, plan: Plan, dtype: torch.dtype) -> Tensor:
    """total + dz.T @ h in `dtype`, written over total if there is one.

    Where the rows are shared out among threads, total is (pieces, N, K), and in the end `_summed`: cut along N or K,
    as a library cuts one product, every thread would read all the rows of one operand.
    """
    rows = dz.shape[0]
    if total is None:
        threads = torch.get_num_threads() if plan.split_rows else 1
        pieces = threads if threads * plan.split_rows <= rows else 1
    else:
        pieces = total.shape[0] if total.ndim == 3 else 1
    if pieces == 1:
        return _add_product(total, dz.t(), h, plan.dweight_gemm, dtype)
    whole = rows - rows % pieces
    a, b = (t[:whole].unflatten(0, (pieces, whole // pieces)) for t in (dz, h))
    if total is None:
        total = torch.bmm(a.mT, b).to(dtype)
    elif dz.dtype == dtype:
        total.baddbmm_(a.mT, b)
    else:
        total.add_(torch.bmm(a.mT, b))
    if whole < rows:
        _add_product(total[0], dz[whole:].t(), h[whole:], "mm", dtype)
    return total


def _summed(total: Tensor) -> Tensor:
    return total.sum(0) if total.ndim == 3 else total


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, gemm: str, dtype: torch.dtype) -> Tensor:
    """total + a @ b in `dtype`, written over total if there is one."""
    if total is None:
        product = _product(a, b, gemm)
        return product if product.dtype == dtype else product.to(dtype)
    if gemm == "onednn" or a.dtype != dtype:
        return total.add_(_product(a, b, gemm))
    return total.addmm_(a, b)
