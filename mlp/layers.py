# SPDX-License-Identifier: Apache-2.0
"""Layers: `nn.Linear` with the activation in the same kernel."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, is_grad_enabled, nn
from torch._C import _get_tracing_state  # pyright: ignore[reportAttributeAccessIssue]
from torch.compiler import is_compiling

from ..kernels import small
from ..kernels.activations import ACTIVATIONS
from ..kernels.eligibility import PLAIN
from .functional import linear_act, linear_sigmoid_bce
from .functional.checks import REDUCTIONS, check_layer
from .functional.eager import ERRORS


class LinearAct(nn.Linear):
    """An `nn.Linear` whose output has gone through `activation`: the base of the fused layers.

    Constructor, initialization, parameters, `state_dict` keys and shapes are those of `nn.Linear`. Parameters are
    read at every call, so tying, `functional_call`, `load_state_dict(assign=True)` and `.double()` work.
    """

    activation: ClassVar[str]

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) -> (..., out_features); see `linear_act`."""
        # What `linear_act` does first is written out for plain tensors: calls are what a tiny layer costs on a CPU.
        own = self.__dict__
        parameters, widths = own["_parameters"], (self.in_features, self.out_features)
        if (
            not is_compiling()
            and type(input) in PLAIN
            and input.is_cpu
            and _get_tracing_state() is None
            # Attributes of an instance, or of a class of somebody's, hide the parameters.
            and type(self) in NAMES
            and "weight" not in own
            and "bias" not in own
            and "bias" in parameters
            and type(weight := parameters.get("weight")) in PLAIN
            and weight.is_cpu
            and input.numel() < small.few_elements(widths, input.dtype, is_grad_enabled())
        ):
            try:
                return ACTIVATIONS[self.activation].forward(F.linear(input, weight, parameters["bias"]))
            except ERRORS:
                if not input.is_nested:
                    check_layer(input, weight, parameters["bias"], self.activation, None)
                raise
        return linear_act(input, self.weight, self.bias, self.activation)


class LinearSigmoid(LinearAct):
    """sigmoid(x @ weight.T + bias): drop-in for `nn.Sequential(nn.Linear(...), nn.Sigmoid())`."""

    activation = "sigmoid"


class LinearTanh(LinearAct):
    """tanh(x @ weight.T + bias): drop-in for `nn.Sequential(nn.Linear(...), nn.Tanh())`."""

    activation = "tanh"


class LinearReLU(LinearAct):
    """relu(x @ weight.T + bias): drop-in for `nn.Sequential(nn.Linear(...), nn.ReLU())`."""

    activation = "relu"


class LinearSigmoidBCELoss(nn.Linear):
    """A head and its loss in one: an `nn.Linear` whose call takes targets too and returns the binary cross entropy.

    forward(x, target) is `nn.BCEWithLogitsLoss` of the logits, `predict(x)` the probabilities. Constructor,
    initialization, parameters and `state_dict` keys are those of `nn.Linear`, with the options of the loss after them:

    pos_weight: (out_features,), the weight of positive targets, or None; a buffer outside the `state_dict`.
    reduction: "mean", "sum" or "none".

    See `mlp_sigmoid_bce` for dtypes and for where `nn.Sigmoid` + `nn.BCELoss` differs.
    """

    pos_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        pos_weight: Tensor | None = None,
        reduction: str = "mean",
    ) -> None:
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
        if pos_weight is not None and not isinstance(pos_weight, Tensor):
            raise TypeError(f"pos_weight must be a Tensor or None, not {type(pos_weight).__name__}")
        super().__init__(in_features, out_features, bias, device, dtype)
        self.register_buffer("pos_weight", pos_weight, persistent=False)
        self.reduction = reduction

    def forward(self, input: Tensor, target: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """input (..., in_features), target (..., out_features) -> the loss."""
        return linear_sigmoid_bce(
            input, self.weight, self.bias, target, pos_weight=self.pos_weight, reduction=self.reduction
        )

    def predict(self, input: Tensor) -> Tensor:
        """input (..., in_features) -> probabilities (..., out_features)."""
        return linear_act(input, self.weight, self.bias, "sigmoid")


# The modules of torch that apply an activation, by its name.
MODULES: dict[str, type[nn.Module]] = dict(sigmoid=nn.Sigmoid, tanh=nn.Tanh, relu=nn.ReLU, identity=nn.Identity)

# The activation that a module of each class applies: layers, and what may stand behind one.
NAMES: dict[type[nn.Module], str] = {nn.Linear: "identity", **{kind: name for name, kind in MODULES.items()}}
NAMES |= {layer: layer.activation for layer in (LinearSigmoid, LinearTanh, LinearReLU)}
