# SPDX-License-Identifier: Apache-2.0
"""Which calls are so small that plain torch operations cost least: what doors ask before anything is planned."""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, is_grad_enabled

from . import crossover
from . import plan as planning
from .devices import cpu_kind, describe, dtype_name
from .operands import widths_of


def prefers_torch(x: Tensor, widths: tuple[int, ...]) -> bool:
    """Whether plain torch operations cost least for layers of these widths, in turn, on x (..., widths[0]).

    On a GPU they may where the host decides how long a call takes, but not on a stream other than the default one:
    there, CUDA graphs are captured and warmed up, and a graph that is replayed asks nothing of the host.
    """
    return is_small(x, widths) and (x.is_cpu or torch._C._cuda_getCurrentRawStream(x.get_device()) == 0)


def is_small(x: Tensor, widths: tuple[int, ...]) -> bool:
    """The same, on the default stream."""
    if x.is_cpu:
        return x.numel() < few_elements(widths, x.dtype, is_grad_enabled())
    if not x.is_cuda:
        return False
    return x.numel() < few_on_gpu(widths, x.dtype, is_grad_enabled(), x.device, torch.is_autocast_enabled("cuda"))


@functools.lru_cache(maxsize=4096)
def few_elements(widths: tuple[int, ...], dtype: torch.dtype, training: bool) -> int:
    """Elements of x below which `prefers_torch` is true on a CPU.

    Where a layer takes 7 us, the call of `prefers_torch` would be 5% of it: hot paths compare with this.
    """
    return crossover.cpu_rows(widths, dtype_name(dtype), cpu_kind(), training) * max(widths[0], 1)


def few_of_any(widths: tuple[int, ...]) -> int:
    """The least of `few_elements` over dtypes and modes: who has it asks a tiny call for neither."""
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return min(few_elements(widths, dtype, training) for dtype in dtypes for training in (False, True))


@functools.lru_cache(maxsize=4096)
def few_on_gpu(
    widths: tuple[int, ...], dtype: torch.dtype, training: bool, device: torch.device, autocast: bool = False
) -> float:
    """The same on the default stream of a GPU."""
    described = describe(device)
    if planning.device_refusal(1, 1, 1, dtype_name(dtype), described):
        return math.inf
    limit = crossover.eager_limit(widths, training, described, autocast)
    return limit / max(dtype.itemsize * crossover.layer_bytes(1, widths), 1) if limit else 0


def network_prefers_torch(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """The same of a network of these weights, which fit together.

    False where tensors are on several devices: torch's product does not notice a weight on the meta device.
    """
    if not prefers_torch(x, widths_of(weights)):
        return False
    return all([weight.is_cpu for weight in weights] if x.is_cpu else [weight.device == x.device for weight in weights])


def trains_plainly(x: Tensor, weight: Tensor) -> bool:
    """Whether a layer on the CPU that wants gradients costs least as plain torch operations under autograd."""
    n, k = weight.shape
    rows = math.prod(x.shape[:-1])
    return planning.linear_act_bwd(rows, k, n, dtype_name(x.dtype), "ieee", describe(x.device), None).impl == "aten"
