# SPDX-License-Identifier: Apache-2.0
"""What the lessons that train begin with: their tables, their networks and the ways in which these train."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain, pairwise
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from ..model import MLP
from .race import FIT_CALLS, FUSED, NN, FitCalls, Loop, Task, fit_contenders

REFERENCE = Path(__file__).parent / "tables"
WAYS = ("nn", "fused", "fit")

Build = Callable[..., nn.Sequential]  # a network of these widths
_Made = TypeVar("_Made")


def table(name: str) -> dict:
    """One of the tables in `tables/`."""
    return json.loads((REFERENCE / f"{name}.json").read_text())


@contextmanager
def own_defaults() -> Iterator[None]:
    """float32 and the CPU for what is made without saying where and in which dtype, whatever the caller has set.

    torch makes some of it: the weights of a layer, and the count of steps that its Adam keeps. The dtype is that of the
    whole process meanwhile.
    """
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # A device that is entered makes every call of torch a little slower.
        with nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)


def draw(seed: int, make: Callable[[], _Made]) -> _Made:
    """make() with torch's CPU generator seeded for it alone; the caller's random numbers are left as they were."""
    # The generator is seeded directly: torch.manual_seed would also reseed those of the GPUs, which are not restored.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return make()


def network_from_seed(seed: int, device: torch.device | str, *widths: Sequence[int]) -> Callable[[Build], nn.Module]:
    """A function that draws networks of each of the widths in turn from one seed and returns the last."""
    return lambda build: draw(seed, lambda: [build(sizes) for sizes in widths])[-1].to(device)


def unfused(sizes: Sequence[int], bias: bool = True) -> nn.Sequential:
    """nn.Linear and nn.Sigmoid in turn, for these widths."""
    return nn.Sequential(*chain.from_iterable((nn.Linear(i, o, bias), nn.Sigmoid()) for i, o in pairwise(sizes)))


def contenders(
    task: Task, network: Callable[[Build], nn.Module], ways: Sequence[str] = WAYS, calls: int = FIT_CALLS
) -> list[Loop | FitCalls]:
    """Each of the ways with a network of its own; calls: of `fit`. Raises ValueError for unknown ways and for none."""
    if not ways or not set(ways) <= set(WAYS):
        raise ValueError(f"ways must be some of {', '.join(WAYS)}, not {ways!r}")
    found: list[Loop | FitCalls] = []
    for way in ways:
        if way == "fit":
            found += fit_contenders(network(MLP), task, calls)
        else:
            found.append(Loop(NN, network(unfused), task) if way == "nn" else Loop(FUSED, network(MLP), task))
    return found
