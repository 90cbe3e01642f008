# SPDX-License-Identifier: Apache-2.0
"""Many networks of one shape, stacked."""

import bisect
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ..kernels.activations import ACTIVATIONS
from .as_network import Refused, as_network
from .history import History
from .model import MLP, is_whole

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
        if not is_whole(num_members):
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
            try:
                network = as_network(model)
            except Refused as reason:
                raise TypeError(f"models[{i}] cannot be a member: {reason}") from None
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

    @classmethod
    def from_seeds(
        cls,
        seeds: Iterable[int] | Tensor,
        sizes: Sequence[int],
        activation: str = "sigmoid",
        output_activation: str | None = None,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "Ensemble":
        """Member i is `MLP(sizes, ...)` as the CPU draws it after `torch.manual_seed(seeds[i])`, to the bit.

        seeds: ints, as a list, a range or a Tensor (E,). torch's own generators are left as they were.

        Raises TypeError for seeds that are no ints, ValueError for none of them and for one that torch.manual_seed
        does not take, and what `MLP` raises for the rest.
        """
        given = seeds.tolist() if isinstance(seeds, Tensor) else seeds
        if not isinstance(given, Iterable):
            raise TypeError(f"seeds must be a sequence of ints, not {given!r}")
        numbers = list(given)
        for i, seed in enumerate(numbers):
            if not is_whole(seed):
                raise TypeError(f"seeds[{i}] must be an int, not {seed!r}")
            if not -(2**63) <= seed < 2**64:
                raise ValueError(f"seeds[{i}] must lie in [-2**63, 2**64), not {seed}")
        if not numbers:
            raise ValueError("seeds must hold at least one seed, not 0")
        device = torch.get_default_device() if device is None else torch.device(device)
        ensemble = cls(len(numbers), sizes, activation, output_activation, bias, "meta", dtype)
        if device.type == "meta":
            return ensemble
        # What the modules of each member would draw, without the modules, which take far longer to make.
        bounds = [bound for inputs in ensemble.sizes[:-1] for bound in _linear_bounds(inputs)[: 1 + bool(bias)]]
        stacks = [p.detach().unbind() for p in in_order(ensemble.to_empty(device="cpu"))]
        generator = torch.Generator("cpu")
        for seed, *parameters in zip(numbers, *stacks, strict=True):
            generator.manual_seed(int(seed))
            for p, bound in zip(parameters, bounds, strict=True):
                p.uniform_(-bound, bound, generator=generator)
        return ensemble.to(device)

    def __len__(self) -> int:
        return self.weights[0].shape[0]

    def _arguments(self) -> tuple:
        """Those of an MLP of a member's shape and dtype, on the meta device."""
        bias, dtype = len(self.biases) > 0, self.weights[0].dtype
        return self.sizes, self.activation, self.output_activation, bias, "meta", dtype

    def forward(self, input: Tensor) -> Tensor:
        """input (B, sizes[0]), which all members see, or (E, B, sizes[0]) -> (E, B, sizes[-1]).

        Differentiable to any order. Raises TypeError for what is no Tensor, ValueError for other shapes and, without
        autocast, for another dtype than that of the parameters.
        """
        if not isinstance(input, Tensor):
            raise TypeError(f"input must be a Tensor, not {type(input).__name__}")
        members = len(self)
        fits = input.dim() == 2 or (input.dim() == 3 and input.shape[0] == members)
        if not fits or input.shape[-1] != self.sizes[0]:
            k = self.sizes[0]
            raise ValueError(f"input {tuple(input.shape)} is neither (B, {k}) nor ({members}, B, {k})")
        if input.dtype != self.weights[0].dtype and not torch.is_autocast_enabled(input.device.type):
            raise ValueError(f"input is {input.dtype}, but the parameters {self.weights[0].dtype}")
        y = input if input.dim() == 3 else input.expand(members, *input.shape)
        for l, weight in enumerate(self.weights):
            z = torch.baddbmm(self.biases[l][:, None], y, weight.mT) if len(self.biases) else torch.bmm(y, weight.mT)
            name = self.activation if l < len(self.weights) - 1 else self.output_activation
            y = ACTIVATIONS[name].forward(z)
        return y

    def member(self, index: int) -> MLP:
        """Member `index` as an MLP with copies of its parameters. Negative indices count from the end.

        Raises IndexError outside the ensemble, TypeError for an index that is no int.
        """
        if not is_whole(index):
            raise TypeError(f"index must be an int, not {index!r}")
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} is outside an ensemble of {len(self)}")
        model = MLP(*self._arguments()).to_empty(device=self.weights[0].device)
        with torch.no_grad():
            for own, stacked in zip(model.parameters(), in_order(self), strict=True):
                own.copy_(stacked[index])
        return model

    def subset(self, indices: Sequence[int] | Tensor | slice) -> "Ensemble":
        """The members with these indices as an ensemble with copies of their parameters.

        indices: ints, of which negative ones count from the end, or a mask, (E,) of bools.

        Raises IndexError outside the ensemble and for a mask of another length, TypeError for what are no integers,
        ValueError for no member.
        """
        index = indices
        if not isinstance(indices, slice):
            given = torch.as_tensor(indices).cpu()
            if given.dim() != 1 or (len(given) and (given.is_floating_point() or given.is_complex())):
                raise TypeError(f"indices must be ints, (n,), not {tuple(given.shape)} of {given.dtype}")
            index = given if given.dtype is torch.bool else given.long()
        chosen = torch.arange(len(self), device="cpu")[index]
        if not len(chosen):
            raise ValueError(f"indices must name at least one of {len(self)} members, not 0")
        part = Ensemble(len(chosen), *self._arguments()).to_empty(device=self.weights[0].device)
        with torch.no_grad():
            for own, stacked in zip(in_order(part), in_order(self), strict=True):
                own.copy_(stacked[chosen.to(stacked.device)])
        return part

    def repeat(self, n: int) -> "Ensemble":
        """Each member n times in a row, as `torch.repeat_interleave` has it: member i is a copy of this one's i // n.

        With lr=rates.repeat(E) each of the E members trains at each of n rates.

        Raises TypeError for an n that is no int, ValueError for one below 1.
        """
        if not is_whole(n):
            raise TypeError(f"n must be an int, not {n!r}")
        if n < 1:
            raise ValueError(f"n must be at least 1, not {n}")
        return self.subset(torch.arange(len(self), device="cpu").repeat_interleave(int(n)))

    def best(self, losses: Tensor | History, k: int = 1) -> list[int]:
        """The indices of the k members with the lowest losses, the lowest first; equal ones in order, NaN last.

        losses: (E,), or the `History` of this ensemble's `fit`: its last evaluation or, without any, its last log; of
        members that keep_best gave their best parameters back, the evaluation or the log of those.

        Raises ValueError for losses of another length, a History that logged nothing, and k outside [1, E], TypeError
        for a k that is no int.
        """
        if isinstance(losses, History):
            losses = _held(losses)
        if not isinstance(losses, Tensor):
            raise TypeError(f"losses must be a Tensor or a History, not {type(losses).__name__}")
        if losses.shape != (len(self),):
            raise ValueError(f"losses {tuple(losses.shape)} are not one for each of {len(self)} members")
        if not is_whole(k):
            raise TypeError(f"k must be an int, not {k!r}")
        if not 1 <= k <= len(self):
            raise ValueError(f"k must lie in [1, {len(self)}], not {k}")
        return torch.sort(losses.detach(), stable=True).indices[:k].tolist()

    def extra_repr(self) -> str:
        names = f"activation={self.activation!r}, output_activation={self.output_activation!r}"
        return f"{len(self)}, {list(self.sizes)}, {names}, bias={len(self.biases) > 0}"


def _held(history: History) -> Tensor:
    """(E,) of what the members hold."""
    at, rows = history.evaluated, history.validation.get("loss")
    if rows is None:
        at, rows = [step + 1 for step in history.steps], history.loss
    if history.kept is None or not len(rows):
        return rows[-1:].squeeze(0)
    index = [max(bisect.bisect(at, steps) - 1, 0) for steps in history.kept.flatten().tolist()]
    return rows[index, range(len(index))]


def in_order(ensemble: Ensemble) -> list[nn.Parameter]:
    """w0, b0, w1, b1, ... (w0, w1, ... without biases)."""
    lists = (ensemble.weights, ensemble.biases) if len(ensemble.biases) else (ensemble.weights,)
    return [p for layer in zip(*lists, strict=True) for p in layer]


def _linear_bounds(inputs: int) -> tuple[float, float]:
    """Of the weight and of the bias that nn.Linear draws, rounded as there, where they differ by a bit."""
    if not inputs:
        return 0, 0  # and not 0.0, whose negative is another number
    gain = nn.init.calculate_gain("leaky_relu", math.sqrt(5))
    return math.sqrt(3.0) * (gain / math.sqrt(inputs)), 1 / math.sqrt(inputs)


def _draw(shape, bound, device, dtype, generator) -> nn.Parameter:
    device = torch.get_default_device() if device is None else torch.device(device)
    if device.type == "meta":
        return nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
    values = torch.empty(shape, device="cpu", dtype=dtype).uniform_(-bound, bound, generator=generator)
    return nn.Parameter(values.to(device))
