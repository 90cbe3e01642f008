"""Many networks of one shape, stacked."""

from collections.abc import Sequence
from itertools import pairwise
from numbers import Integral

import torch
from torch import Tensor, nn

from ..kernels.activations import ACTIVATIONS
from .as_network import as_network
from .history import History
from .model import MLP

__all__ = ["Ensemble"]


class Ensemble(nn.Module):
    """`num_members` independent networks of the same shape, with stacked parameters.

    sizes, activation, output_activation, bias: those of an `MLP`. Layer l has `weights[l]` (E, out, in) and
    `biases[l]` (E, out) for E members; `member(i)` is member i as an MLP of its own.

    Parameters are drawn as `nn.Linear` draws its own, uniform within 1 / sqrt(in_features). generator: a CPU generator
    to draw from, torch's default one otherwise; the numbers are the same on every device.

    Raises ValueError for fewer than one member and what `MLP` raises for the rest.
    """

    def __init__(
        self,
        num_members: int,
        sizes: Sequence[int],
        activation: str = "sigmoid",
        output_activation: str | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_members, Integral):
            raise TypeError(f"num_members must be an int, not {num_members!r}")
        if num_members < 1:
            raise ValueError(f"num_members must be at least 1, not {num_members}")
        MLP(sizes, activation, output_activation, bias, "meta")  # raises the errors of all these arguments
        self.sizes = tuple(map(int, sizes))
        self.activation = activation
        self.output_activation = activation if output_activation is None else output_activation
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for inputs, outputs in pairwise(self.sizes):
            bound = inputs**-0.5 if inputs else 0.0
            self.weights.append(_draw((num_members, outputs, inputs), bound, device, dtype, generator))
            if bias:
                self.biases.append(_draw((num_members, outputs), bound, device, dtype, generator))

    @classmethod
    def from_models(cls, models: Sequence[nn.Module]) -> "Ensemble":
        """Stacks copies of the models, each an `MLP` or an `nn.Sequential` of linear layers and activations.

        Raises TypeError for a model that is none of these, ValueError for no models and for models that differ in
        shape, activations, dtype or device.
        """
        kinds, parameters = [], []
        for i, model in enumerate(models):
            network = as_network(model)
            if isinstance(network, str):
                raise TypeError(f"models[{i}] cannot be a member: {network}")
            first = network.parameters[0]
            kinds.append((network.widths, network.hidden, network.output, network.bias, first.dtype, first.device))
            parameters.append(network.parameters)
        if not kinds:
            raise ValueError("models must hold at least one model, not 0")
        for i, kind in enumerate(kinds):
            if kind != kinds[0]:
                raise ValueError(f"models[{i}] is {kind}, but models[0] {kinds[0]}")
        widths, hidden, output, bias, dtype, device = kinds[0]
        ensemble = cls(len(kinds), widths, hidden, output, bias, "meta", dtype).to_empty(device=device)
        with torch.no_grad():
            for own, *given in zip(in_order(ensemble), *parameters, strict=True):
                torch.stack(given, out=own)
        return ensemble

    def __len__(self) -> int:
        return self.weights[0].shape[0]

    def _arguments(self) -> tuple:
        """Those of an MLP of a member's shape and dtype, on the meta device."""
        bias, dtype = len(self.biases) > 0, self.weights[0].dtype
        return self.sizes, self.activation, self.output_activation, bias, "meta", dtype

    def forward(self, input: Tensor) -> Tensor:
        """input (B, sizes[0]), which all members see, or (E, B, sizes[0]) -> (E, B, sizes[-1]).

        Differentiable to any order. Raises ValueError for other shapes.
        """
        members = len(self)
        fits = input.dim() == 2 or (input.dim() == 3 and input.shape[0] == members)
        if not fits or input.shape[-1] != self.sizes[0]:
            k = self.sizes[0]
            raise ValueError(f"input {tuple(input.shape)} is neither (B, {k}) nor ({members}, B, {k})")
        y = input if input.dim() == 3 else input.expand(members, *input.shape)
        for l, weight in enumerate(self.weights):
            z = torch.baddbmm(self.biases[l][:, None], y, weight.mT) if len(self.biases) else torch.bmm(y, weight.mT)
            name = self.activation if l < len(self.weights) - 1 else self.output_activation
            y = ACTIVATIONS[name].forward(z)
        return y

    def member(self, index: int) -> MLP:
        """Member `index` as an MLP with copies of its parameters. Negative indices count from the end.

        Raises IndexError outside the ensemble.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside an ensemble of {len(self)}")
        model = MLP(*self._arguments()).to_empty(device=self.weights[0].device)
        with torch.no_grad():
            for own, stacked in zip(model.parameters(), in_order(self), strict=True):
                own.copy_(stacked[index])
        return model

    def subset(self, indices: Sequence[int] | Tensor | slice) -> "Ensemble":
        """The members with these indices as an ensemble with copies of their parameters.

        Raises IndexError outside the ensemble, ValueError for no member.
        """
        index = indices if isinstance(indices, slice) else torch.as_tensor(indices).cpu()
        chosen = torch.arange(len(self), device="cpu")[index]
        part = Ensemble(len(chosen), *self._arguments()).to_empty(device=self.weights[0].device)
        with torch.no_grad():
            for own, stacked in zip(in_order(part), in_order(self), strict=True):
                own.copy_(stacked[chosen.to(stacked.device)])
        return part

    def best(self, losses: Tensor | History, k: int = 1) -> list[int]:
        """The indices of the k members with the lowest losses, the lowest first; equal ones in order, NaN last.

        losses: (E,), or the `History` of this ensemble's `fit`: its last evaluation or, without any, its last log.

        Raises ValueError for losses of another length, a History that logged nothing, and k outside [1, E].
        """
        if isinstance(losses, History):
            losses = losses.validation.get("loss", losses.loss)[-1:].squeeze(0)
        if losses.shape != (len(self),):
            raise ValueError(f"losses {tuple(losses.shape)} are not one for each of {len(self)} members")
        if not 1 <= k <= len(self):
            raise ValueError(f"k must lie in [1, {len(self)}], not {k}")
        return torch.sort(losses.detach(), stable=True).indices[:k].tolist()

    def extra_repr(self) -> str:
        names = f"activation={self.activation!r}, output_activation={self.output_activation!r}"
        return f"{len(self)}, {list(self.sizes)}, {names}, bias={len(self.biases) > 0}"


def in_order(ensemble: Ensemble) -> list[nn.Parameter]:
    """w0, b0, w1, b1, ... (w0, w1, ... without biases)."""
    lists = (ensemble.weights, ensemble.biases) if len(ensemble.biases) else (ensemble.weights,)
    return [p for layer in zip(*lists, strict=True) for p in layer]


def _draw(shape, bound, device, dtype, generator) -> nn.Parameter:
    device = torch.get_default_device() if device is None else torch.device(device)
    if device.type == "meta":
        return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
    values = torch.empty(shape, device="cpu", dtype=dtype).uniform_(-bound, bound, generator=generator)
    return nn.Parameter(values.to(device))
