"""y = act(x @ weight.T + bias) and its backward in plain torch: the definition of correct, and the CPU path.

Shapes: x (M, K), weight (N, K), bias (N,), y and dy (M, N). With dz = dy * act'(y):

    dx = dz @ weight        dweight = dz.T @ x        dbias = sum of dz over the rows
"""

import functools
import math

import torch
from torch import Tensor

from .activations import ACTIVATIONS, Activation
from .plan import Plan


@functools.cache
def onednn_linear():
    """oneDNN's product x @ weight.T + bias with a fused activation, or None where this torch has none that works.

    `torch.ops.mkldnn._linear_pointwise` is private, so it is tried once against torch's own product. It reads a
    strided bias as if it were dense, its relu drops NaN, and it takes fp32 and bf16 only: callers see to that.
    """
    try:
        linear = torch.ops.mkldnn._linear_pointwise.default
        # Whatever device and dtype this process has as its defaults.
        x = torch.eye(3, 4, dtype=torch.float32, device="cpu")
        weight = torch.arange(8, dtype=torch.float32, device="cpu").view(2, 4)
        bias = x.new_tensor([0.5, -0.5])
        for post_op, function in (("none", torch.clone), ("sigmoid", torch.sigmoid), ("tanh", torch.tanh)):
            want = function(torch.addmm(bias, x, weight.t()))
            if not torch.allclose(linear(x, weight, bias, post_op, [], ""), want, atol=1e-6):
                return None
        return linear
    except Exception:  # whatever a private function may raise, the answer is the same: do without it
        return None


def linear_act_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, plan: Plan) -> Tensor:
    """act(x @ weight.T + bias), (M, N), in the dtype of x."""
    act = ACTIVATIONS[activation]
    onednn = onednn_linear() if plan.forward_gemm == "onednn" else None
    if onednn is not None:
        if bias is not None and not bias.is_contiguous():
            bias = bias.contiguous()
        y = onednn(x, weight, bias, act.post_op, [], "")
        return y if act.post_op != "none" else act.forward_(y)
    z = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    return act.forward_(z)


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
    act = ACTIVATIONS[activation]
    if plan.chunk and plan.chunk < dy.shape[0]:
        return _linear_act_bwd_chunked(dy, y, x, weight, act, wanted, plan)
    need_dx, need_dweight, need_dbias = wanted
    dz = act.backward(dy, y)
    return (
        _product(dz, weight, plan.dx_gemm) if need_dx and weight is not None else None,
        _product(dz.t(), x, plan.dweight_gemm) if need_dweight and x is not None else None,
        dz.sum(0) if need_dbias else None,
    )


def _linear_act_bwd_chunked(
    dy: Tensor,
    y: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    act: Activation,
    wanted: tuple[bool, bool, bool],
    plan: Plan,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    need_dx, need_dweight, need_dbias = wanted
    m, n = dy.shape
    dx = dy.new_empty((m, weight.shape[1])) if need_dx and weight is not None else None
    # Sums over the pieces are kept in fp32 whatever the dtype.
    dweight = dy.new_zeros((n, x.shape[1]), dtype=torch.float32) if need_dweight and x is not None else None
    dbias = dy.new_zeros(n, dtype=torch.float32) if need_dbias else None
    buffer = dy.new_empty((plan.chunk, n))
    for start in range(0, m, plan.chunk):
        rows = slice(start, min(start + plan.chunk, m))
        dz = act.backward_into(dy[rows], y[rows], buffer[: rows.stop - start])
        if dx is not None and weight is not None:
            if plan.dx_gemm == "onednn":
                dx[rows] = _product(dz, weight, "onednn")
            else:
                torch.mm(dz, weight, out=dx[rows])
        if dweight is not None and x is not None:
            if plan.dweight_gemm == "onednn" or dz.dtype != torch.float32:
                dweight += _product(dz.t(), x[rows], plan.dweight_gemm)
            else:
                dweight.addmm_(dz.t(), x[rows])
        if dbias is not None:
            dbias += dz.sum(0, dtype=torch.float32)
    return dx, None if dweight is None else dweight.to(dy.dtype), None if dbias is None else dbias.to(dy.dtype)


def _product(a: Tensor, b: Tensor, gemm: str) -> Tensor:
    onednn = onednn_linear() if gemm == "onednn" else None
    return torch.mm(a, b) if onednn is None else onednn(a, b.t(), None, "none", [], "")


def linear_act_double(
    dy: Tensor,
    y: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    activation: str,
    wanted: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The same gradients from differentiable operations, for any leading dimensions: what create_graph needs."""
    need_dx, need_dweight, need_dbias = wanted
    dz = dy * ACTIVATIONS[activation].prime(y)
    flat = dz.reshape(math.prod(dz.shape[:-1]), dz.shape[-1])
    return (
        torch.matmul(dz, weight) if need_dx and weight is not None else None,
        torch.mm(flat.t(), x.reshape(flat.shape[0], x.shape[-1])) if need_dweight and x is not None else None,
        flat.sum(0) if need_dbias else None,
    )
