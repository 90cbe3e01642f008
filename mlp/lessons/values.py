# SPDX-License-Identifier: Apache-2.0
"""Results that can be held against a reference, and named quantities, which several ways of computing arrive at."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


class Result(ABC):
    """What a lesson returns."""

    @property
    @abstractmethod
    def misses(self) -> list[str]:
        """What does not match the reference, one phrase for each; empty if everything does."""

    @property
    def matches(self) -> bool:
        """Whether everything lies within its band."""
        return not self.misses


@dataclass(frozen=True)
class Values:
    """The named quantities that one way of computing arrives at, without those that it does not show."""

    name: str
    dtype: torch.dtype
    values: dict[str, float]


def value_misses(reference: dict[str, float], found: Sequence[Values], band: Callable[[Values], float]) -> list[str]:
    """The values in the reference that differ from the reference by more than the band, one phrase for each."""
    return [
        f"{way.name} in {str(way.dtype).removeprefix('torch.')}: {name} = {value:.10g} and not {reference[name]:.10g}"
        for way in found
        for name, value in way.values.items()
        if name in reference and not abs(value - reference[name]) <= band(way)
    ]
