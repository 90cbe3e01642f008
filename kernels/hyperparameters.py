# SPDX-License-Identifier: Apache-2.0
"""What members of a stack of networks may have of their own, and the factor of a loss."""

from dataclasses import dataclass

from torch import Tensor

from .records import TrainConfig


@dataclass(frozen=True)
class Hyperparameters:
    """Numbers of each member, (E,), in the place of the one that a TrainConfig has for all; None: the config's.

    The config still says what a step is made of. Where its momentum or weight decay is 0 there is none, so it must have
    another number for those that members have of their own, of which some may be 0.
    """

    momentum: Tensor | None = None
    weight_decay: Tensor | None = None
    beta1: Tensor | None = None
    beta2: Tensor | None = None

    def part(self, members: Tensor) -> "Hyperparameters":
        """Those of these members."""
        return Hyperparameters(**{name: n if n is None else n[members] for name, n in vars(self).items()})

    def of(self, config: TrainConfig, name: str) -> "float | Tensor":
        """In fp64, in which 1 - beta has its digits."""
        own = getattr(self, name)
        return getattr(config, name) if own is None else own.double()

    def undamped(self, config: TrainConfig) -> "float | Tensor":
        """1 - dampening, which torch.optim has for a buffer alone: not where the momentum is 0."""
        if self.momentum is None or not config.dampening:
            return 1 - config.dampening
        return (self.momentum == 0).double() * config.dampening + (1 - config.dampening)


COMMON = Hyperparameters()


def loss_scale(config: TrainConfig, batch: int) -> float:
    """What multiplies the sum of the losses of a batch, beside what `run` may be given for a step.

    A sample is one term of the mean of torch's cross entropy, and of other losses as many as it has outputs.
    """
    terms = batch * (1 if config.loss == "cross_entropy" else config.widths[-1])
    return config.factor / terms if config.reduction == "mean" else config.factor
