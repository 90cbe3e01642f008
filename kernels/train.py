# SPDX-License-Identifier: Apache-2.0
"""The door to whole training loops: which implementation trains, and where it is."""

from typing import Any

import torch

from . import plan as planning
from .devices import cpu_refusal, describe, dtype_name, gpu
from .loop import TorchLoop
from .native import ready
from .native.loop import NativeLoop
from .records import TrainConfig, TrainPlan


def plan_train(
    members: int,
    samples: int,
    batch_size: int | None,
    config: TrainConfig,
    dtype: torch.dtype,
    device: torch.device,
    impl: str | None = None,
    steps: int | None = None,
) -> TrainPlan:
    """Which implementation trains `members` networks on `samples` samples each, and why. batch_size: None for all.

    steps: for how many it is to be the fastest, None for many.

    Raises NotImplementedError with the reason where `impl` cannot be obeyed.
    """
    kernels = impl in ("lane", "block")
    if kernels and (reason := cpu_refusal(device)):
        raise NotImplementedError(f"impl={impl!r}: {reason}")
    described = describe(device, kernels and device.type == "cpu")
    native: dict[str, Any] = {}
    if device.type == "cpu" and impl in (None, "native"):
        refusal = ready.refusal()
        waits = {"steps": steps, "native_seconds": ready.seconds(dtype), "missed": ready.missed}
        native = {"native_refusal": refusal} if refusal else waits
    plan = planning.train(members, samples, batch_size, config, dtype_name(dtype), described, impl, **native)
    if impl is not None and plan.impl != impl:
        raise NotImplementedError(f"impl={impl!r}: {plan.reason}")
    return plan


def training_loop(plan: TrainPlan) -> "type[TorchLoop] | type[NativeLoop]":
    """The implementation of the plan, which is to run; the others have the signatures of `TorchLoop`."""
    ready.missed += plan.missed
    if plan.impl == "native":
        return NativeLoop
    return TorchLoop if plan.impl in ("torch", "graph") else gpu("train").KernelLoop
