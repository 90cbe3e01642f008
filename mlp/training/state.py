# SPDX-License-Identifier: Apache-2.0
"""The state that an optimizer of torch keeps, taken over and handed back."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype

from ...kernels.hyperparameters import Hyperparameters
from ...kernels.records import TrainConfig
from ..as_network import Network, Refused, share_memory

COUNTED = ("exp_avg", "square_avg")  # which torch.optim keeps a counter of steps with


class State:
    """The optimizer's state of each parameter, which earlier steps left and ordinary later steps can go on from."""

    def __init__(self, optimizer, network: Network, names: tuple[str, ...], own: Hyperparameters, taken: int) -> None:
        """own: the numbers that members have of their own. taken: how many steps have updated the state."""
        self.optimizer, self.network, self.names, self.own, self.taken = optimizer, network, names, own, taken

    @classmethod
    def read(
        cls, optimizer: torch.optim.Optimizer, network: Network, config: TrainConfig, own: Hyperparameters
    ) -> "State":
        """The state. Raises Refused where it is not that of ordinary steps."""
        names = {"sgd": (), "rmsprop": ("square_avg",)}.get(config.optimizer, ("exp_avg", "exp_avg_sq"))
        names += ("momentum_buffer",) if config.momentum else ()
        entries = [optimizer.state.get(p, {}) for p in network.parameters]
        found = [tuple(entry.get(name) for name in names) for entry in entries]
        if all(value is None for values in found for value in values):
            return cls(optimizer, network, names, own, 0)
        for p, values in zip(network.parameters, found, strict=True):
            if any(not isinstance(v, Tensor) or (v.shape, v.dtype) != (p.shape, p.dtype) for v in values):
                raise Refused("the optimizer's state does not fit the parameters, or is there for some only")
        tensors = [v for values in found for v in values]
        if any(v.is_inference() for v in tensors) or share_memory([*network.parameters, *tensors]):
            raise Refused("the optimizer's state cannot be written to, or shares memory")
        taken = 1  # of SGD's steps only the first differs from the others
        if config.optimizer != "sgd":
            counts = {float(entry.get("step", 0)) for entry in entries}
            if len(counts) > 1 or min(counts) < 1:
                raise Refused("the optimizer has taken different numbers of steps for different parameters")
            taken = int(counts.pop())
        return cls(optimizer, network, names, own, taken)

    def tensors(self) -> list[list[Tensor]]:
        """The first and the second tensor of each parameter, zeros before its first step; [] where there is none."""
        state, parameters = self.optimizer.state, self.network.parameters
        found = [[state[p][name] if self.taken else torch.zeros_like(p) for p in parameters] for name in self.names]
        return [*found, [], []][:2]

    def write(self, steps: int, first: Sequence[Tensor], second: Sequence[Tensor], members: Tensor | None) -> None:
        """Takes over what `steps` more steps have made of the state of these members, None: of all."""
        self.taken += steps
        (group,) = self.optimizer.param_groups
        for name, tensors in zip(self.names, (first, second), strict=False):
            for p, tensor in zip(self.network.parameters, tensors, strict=True):
                entry = self.optimizer.state[p]
                if entry.get(name) is None:
                    if name in COUNTED:
                        # As torch.optim makes its counter.
                        fused = bool(group.get("fused"))
                        dtype, device = _get_scalar_dtype(is_fused=fused), p.device if fused else "cpu"
                        entry["step"] = torch.zeros((), dtype=dtype, device=device)
                    entry[name] = torch.zeros_like(p, memory_format=torch.preserve_format, requires_grad=False)
                if name == "momentum_buffer" and self.own.momentum is not None:
                    # A step without momentum touches no buffer: one that there is may be gone on from later.
                    every = torch.arange(len(p), device=p.device) if members is None else members
                    moving = (self.own.momentum.to(p.device) != 0)[every]
                    write_members(entry[name], tensor[moving], every[moving])
                else:
                    write_members(entry[name], tensor, members)
        for p in self.network.parameters if {*COUNTED} & {*self.names} else ():
            self.optimizer.state[p]["step"].fill_(self.taken)
        if hasattr(self.optimizer.step, "_wrapped_by_lr_sched"):
            self.optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]


def write_members(to: Tensor, numbers: Tensor, members: Tensor | None) -> None:
    """Overwrites what these members have, None: all, or the one network that is no member."""
    if members is None:
        to.copy_(numbers.view(to.shape) if numbers.dim() > to.dim() else numbers)
    else:
        to[members] = numbers
