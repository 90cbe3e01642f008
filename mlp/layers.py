"""Layers: `nn.Linear` with the activation in the same kernel."""

from typing import ClassVar

from torch import Tensor, nn

from .functional import linear_act

__all__ = ["LAYERS", "LinearAct", "LinearReLU", "LinearSigmoid", "LinearTanh"]


class LinearAct(nn.Linear):
    """An `nn.Linear` whose output has gone through `activation`; the base of the three layers below.

    Constructor, initialization, parameters, `state_dict` keys and shapes are those of `nn.Linear`. Parameters are
    read at every call, so tying, `functional_call`, `load_state_dict(assign=True)` and `.double()` work.
    """

    activation: ClassVar[str]

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) -> (..., out_features); see `linear_act`."""
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


LAYERS: dict[str, type[nn.Linear]] = {layer.activation: layer for layer in (LinearSigmoid, LinearTanh, LinearReLU)} | {
    "identity": nn.Linear
}
