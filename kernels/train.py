"""The door to whole training loops: which implementation trains, and where it is."""

import torch

from . import plan as planning
from .devices import describe, dtype_name, gpu
from .eligibility import cpu_refusal
from .loop import TorchLoop
from .records import TrainConfig, TrainPlan


def plan_train(
    members: int,
    samples: int,
    batch_size: int | None,
    config: TrainConfig,
    dtype: torch.dtype,
    device: torch.device,
    impl: str | None = None,
) -> TrainPlan:
    """Which implementation trains `members` networks on `samples` samples each, and why. batch_size: None for all.

    Raises NotImplementedError with the reason where `impl` cannot be obeyed.
    """
    kernels = impl in ("lane", "block")
    if kernels and (reason := cpu_refusal(device)):
        raise NotImplementedError(f"impl={impl!r}: {reason}")
    described = describe(device, kernels and device.type == "cpu")
    plan = planning.train(members, samples, batch_size, config, dtype_name(dtype), described, impl)
    if impl is not None and plan.impl != impl:
        raise NotImplementedError(f"impl={impl!r}: {plan.reason}")
    return plan


def training_loop(plan: TrainPlan) -> "type[TorchLoop]":
    """The implementation of the plan; the others have the signatures of `TorchLoop`."""
    return TorchLoop if plan.impl in ("torch", "graph") else gpu("train").KernelLoop
