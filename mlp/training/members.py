# SPDX-License-Identifier: Apache-2.0
"""The numbers that `fit` is given for each member in the place of the optimizer's own."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ...kernels.hyperparameters import Hyperparameters
from ...kernels.records import TrainConfig
from ..ensemble import Ensemble

PerMember = Mapping[str, Tensor | tuple[float | Tensor, float | Tensor]]

# The fields of a TrainConfig that a number of a parameter group is.
FIELDS = {"weight_decay": ("weight_decay",), "momentum": ("momentum",), "betas": ("beta1", "beta2")}
# A config without weight decay or momentum has none, whatever its members have.
STAND_IN = 0.5
# What torch.optim takes: of NaN none of these is true.
INSIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "not be negative": lambda number: number >= 0,
    "lie in [0, 1)": lambda number: (number >= 0) & (number < 1),
    "be positive, as nesterov asks": lambda number: number > 0,
}


def check_members(per_member: object, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    if per_member is None:
        return
    if not isinstance(per_member, Mapping):
        raise TypeError(f"per_member must be a dict, not {type(per_member).__name__}")
    if not isinstance(model, Ensemble):
        raise TypeError(
            f"per_member is for the members of an Ensemble, and the model is of type {type(model).__name__}"
        )
    for name, value in per_member.items():
        if name == "lr":
            raise ValueError("per_member holds 'lr', but rates of each member are the argument lr")
        if name not in FIELDS:
            raise ValueError(f"per_member may hold {', '.join(map(repr, FIELDS))}, not {name!r}")
        if any(name not in group for group in optimizer.param_groups):
            raise ValueError(f"per_member holds {name!r}, which a {type(optimizer).__name__} does not have")
        nesterov = name == "momentum" and any(group.get("nesterov") for group in optimizer.param_groups)
        if name != "betas":
            wanted = "be positive, as nesterov asks" if nesterov else "not be negative"
            _check_number(f"per_member[{name!r}]", value, len(model), wanted)
            continue
        if not isinstance(value, tuple | list) or len(value) != 2:
            raise TypeError(f"per_member['betas'] must be a pair, not {value!r:.80}")
        for i, beta in enumerate(value):
            if isinstance(beta, Real) and not isinstance(beta, bool):
                beta = torch.full((len(model),), float(beta), dtype=torch.float64, device="cpu")
            _check_number(f"per_member['betas'][{i}]", beta, len(model), "lie in [0, 1)")


def _check_number(label: str, value: object, members: int, wanted: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{label} must be a Tensor, not {type(value).__name__}")
    if value.shape != (members,):
        raise ValueError(f"{label} {tuple(value.shape)} is not ({members},), a number for each member")
    if not value.is_floating_point():
        raise TypeError(f"{label} must be a floating point tensor, not {value.dtype}")
    inside = INSIDE[wanted](value)
    if not bool(inside.all()):
        first = int(inside.logical_not().nonzero()[0])
        raise ValueError(f"{label} must {wanted}, but that of member {first} is {value[first].item()}")


def own_numbers(per_member: PerMember | None, config: TrainConfig) -> tuple[TrainConfig, Hyperparameters]:
    """The config of all members, and the numbers that each has of its own."""
    given = dict(_by_field(per_member or {}))
    own = {field: v.cpu().double() for field, v in given.items() if isinstance(v, Tensor)}
    shared = {field: STAND_IN if field in own else float(v) for field, v in given.items()}
    return replace(config, **shared), Hyperparameters(**own)


def _by_field(per_member: PerMember) -> Iterator[tuple[str, Any]]:
    for name, value in per_member.items():
        yield from zip(FIELDS[name], value if name == "betas" else (value,), strict=True)


def numbers_of(per_member: PerMember | None, members: slice) -> PerMember | None:
    """What holds for these members."""

    def part(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value[members]
        return tuple(map(part, value)) if isinstance(value, tuple | list) else value

    return per_member and {name: part(value) for name, value in per_member.items()}
