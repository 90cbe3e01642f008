# SPDX-License-Identifier: Apache-2.0
"""Which implementation a layer or a network takes at which shape, and why."""

import dataclasses
import math
from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple, cast, overload

import torch

from . import plan as planning
from .crossover import limit_note
from .devices import cpu_refusal, device_for, dtype_name, fp32_precision, fp32_split
from .ops import obey
from .records import IMPLS, Device, MlpPlan, Plan


def _listed(self) -> str:
    return "\n".join(
        f"{name:9} {plan.impl:8}  {plan.reason}" + (f"\n{'':20}{plan.prediction}" if plan.prediction else "")
        for name, plan in self._asdict().items()
    )


class Explanation(NamedTuple):
    """The plans for one layer at one shape."""

    forward: Plan
    backward: Plan
    __str__ = _listed


class MlpExplanation(NamedTuple):
    """The plans for one network at one shape: forward without gradients, and both directions of a training step."""

    inference: MlpPlan
    forward: MlpPlan
    backward: MlpPlan
    __str__ = _listed


def _described(device: torch.device | str | Device, impl: str | None) -> Device:
    """A chip by its name or its description, or a device that is at hand."""
    if isinstance(device, Device):
        return device
    if isinstance(device, str) and device in planning.PEAKS:
        return planning.PEAKS[device].device
    try:
        device = torch.device(device)
    except RuntimeError as error:
        named = ", ".join(map(repr, planning.PEAKS))
        raise ValueError(f"device {device!r}: {error}; chips that it may name: {named}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {str(device)!r} is not at hand; describe it with perceptriton.kernels.Device, or name its chip"
        )
    if impl == "triton" and (reason := cpu_refusal(device)):
        raise NotImplementedError(f'impl="triton": {reason}')
    if device.type == "cuda" and device.index is None:
        # The current device may be another one at the next call.
        device = torch.device("cuda", torch.cuda.current_device())
    return device_for(device, impl)


def _checked(name: str, shape: object) -> tuple[int, ...]:
    if not isinstance(shape, Sequence) or not all(isinstance(size, Integral) for size in shape):
        raise TypeError(f"{name} must be a sequence of ints, not {shape!r}")
    if any(size < 0 for size in shape):
        raise ValueError(f"{name} must not be negative: {tuple(shape)}")
    return tuple(map(int, shape))


@overload
def explain(
    x_shape: Sequence[int],
    weight_shape: Sequence[int],
    dtype: torch.dtype = ...,
    device: torch.device | str | Device = ...,
    *,
    impl: str | None = ...,
) -> Explanation: ...
@overload
def explain(
    x_shape: Sequence[int],
    weight_shape: Sequence[Sequence[int]],
    dtype: torch.dtype = ...,
    device: torch.device | str | Device = ...,
    *,
    impl: str | None = ...,
) -> MlpExplanation: ...
def explain(
    x_shape: Sequence[int],
    weight_shape: Sequence[int] | Sequence[Sequence[int]],
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | Device = "cpu",
    *,
    impl: str | None = None,
) -> Explanation | MlpExplanation:
    """Which implementation a layer or a network takes, with its tiles and the reason. Launches nothing.

    Of a GPU the reason says too whether eager calls launch what is named. Where they take plain torch, because they
    would wait for the host, it says below which size, and what is named is what they launch on other streams than the
    default one, CUDA graphs, programs compiled for a dynamic batch and impl="triton". "uncalibrated": by a model of
    calls and bandwidth (crossover.py), for a device of which `benches/tune.py launches` has measured nothing.

    Plans for GPUs carry a `prediction`, which `print` shows too: the time that the plan's flops and bytes take at the
    chip's peak rates with sigmoids, and the least that any plan could take (the model: `predict`, `predict_bwd` and
    `predict_mlp` in plan/predict.py). The rates are those of data sheets. For a device with a name that is not in
    peaks.py they are those of another chip of its compute capability, or an H200's, as the text says.

    x_shape: (..., in_features). weight_shape: (out_features, in_features) of a layer, or a sequence of such pairs, one
    per layer of a network. device: where the tensors would be, or a chip that is not at hand: one of the names in
    peaks.py ("RTX 3090", "RTX 4090", "RTX 5090", "A10", "L4", "L40S", "A100", "H100", "H200", "B200"), or a
    description as in `Device("cuda", arch=90, units=132, triton=True)`. Raises ValueError for shapes that do not fit
    and an unknown impl or device, TypeError for what is no shape or no dtype, NotImplementedError where a call would.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}, not {impl!r}")
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"dtype must be a torch.dtype, not {dtype!r}")
    network = isinstance(weight_shape, Sequence) and len(weight_shape) > 0 and not isinstance(weight_shape[0], Integral)
    *leading, features = _checked("x_shape", x_shape) or (None,)
    shapes = [_checked("weight_shape", shape) for shape in (weight_shape if network else [weight_shape])]
    for shape in shapes:
        if len(shape) != 2 or shape[1] != features:
            raise ValueError(f"weight_shape {tuple(weight_shape)} does not fit x_shape {tuple(x_shape)}")
        features = shape[0]
    device = _described(device, impl)
    rows, name, precision, split = math.prod(leading), dtype_name(dtype), fp32_precision(device), fp32_split(dtype)
    # The plans are those for operands that lie dense in memory.
    layers = [(rows, k, n, name, precision, device, impl, split, k * dtype.itemsize % 16 == 0) for n, k in shapes]
    forwards = tuple(planning.linear_act_fwd(*arguments) for arguments in layers)
    backwards = tuple(planning.linear_act_bwd(*arguments[:7]) for arguments in layers)
    widths = (shapes[0][1], *(n for n, _ in shapes))
    explanation = Explanation(forwards[0], backwards[0])
    if network:
        options = (rows, widths, name, precision, device)
        inference, training = (planning.mlp_both(*options, both, False, impl, split) for both in (False, True))
        explanation = MlpExplanation(inference.forward, training.forward, cast(MlpPlan, training.backward))
    obey(impl, explanation.forward)
    if device.kind != "cuda" or planning.device_refusal(rows, min(widths), 1, name, device):
        return explanation
    nbytes, peaks = rows * widths[0] * dtype.itemsize, planning.peaks_of(device)

    def with_prediction(plan, prediction):
        note = limit_note(nbytes, widths, plan is explanation.backward, device) if impl is None else ""
        return dataclasses.replace(plan, reason=plan.reason + note, prediction=prediction)

    if isinstance(explanation, Explanation):
        (k, n), (forward, backward) = widths, explanation
        predictions = [
            planning.predict(rows, k, n, name, forward, peaks),
            planning.predict_bwd(rows, k, n, name, backward, peaks=peaks),
        ]
    else:
        shape, (inference, forward, backward) = (rows, widths, name), explanation
        predictions = [
            planning.predict_mlp(*shape, inference, forwards, peaks=peaks),
            planning.predict_mlp(*shape, forward, forwards, boundaries=backward.boundaries, peaks=peaks),
            planning.predict_mlp(*shape, backward, backwards, backward=True, peaks=peaks),
        ]
    return type(explanation)(*map(with_prediction, explanation, predictions))
