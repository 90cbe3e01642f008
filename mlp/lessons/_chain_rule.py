# SPDX-License-Identifier: Apache-2.0
"""The lesson of the slopes of f = w x + b."""

import statistics
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..functional import linear_act
from .lesson import Lesson
from .problem import draw, own_defaults, table
from .race import FUSED, HAND
from .text import View, grid, number, page, sections
from .values import Result, Values, value_misses


@dataclass(frozen=True)
class ChainRule(Result):
    """What `chain_rule` returns."""

    w: float
    x: float
    b: float
    reference: dict[str, float]  # by name: f, df/dw, df/dx, df/db, df/dg
    ways: tuple[Values, ...]
    us: dict[str, float]  # microseconds for f and its derivatives, median over turns

    @property
    def misses(self) -> list[str]:
        """What does not equal the reference, one phrase for each: all of it is exact in binary."""
        return value_misses(self.reference, self.ways, lambda way: 0.0)


@own_defaults()
def chain_rule(device: torch.device | str = "cpu") -> ChainRule:
    """The derivatives of f = w x + b, with g = w x: by the chain rule, by differences, by autograd, by a fused layer.

    The fused layer has one input, one output and no activation. It shows no g; differences and autograd do.
    """
    given = table("chain_rule")
    w, x, b = (float(given[name]) for name in "wxb")
    reference = {"f": given["f"]} | {f"df/d{name}": given[f"df_d{name}"] for name in "wxbg"}
    layer = draw(0, lambda: nn.Linear(1, 1)).to(device)
    ways: dict[str, Callable[[], dict[str, float]]] = {
        HAND: partial(_by_hand, w, x, b),
        "differences": partial(_by_differences, w, x, b),
        "autograd": partial(_by_autograd, w, x, b, device),
        "nn.Linear": partial(_by_layer, w, x, b, layer, layer),
        FUSED: partial(_by_layer, w, x, b, layer, lambda x: linear_act(x, layer.weight, layer.bias, "identity")),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(20):
        for name, way in ways.items():
            seconds[name].append(timeit.timeit(way, number=10) / 10)
    found = tuple(Values(name, torch.float32, way()) for name, way in ways.items())
    return ChainRule(w, x, b, reference, found, {name: 1e6 * statistics.median(s) for name, s in seconds.items()})


def _by_hand(w: float, x: float, b: float) -> dict[str, float]:
    g = w * x
    f = g + b
    df_dg, df_db = 1.0, 1.0  # f = g + b
    dg_dw, dg_dx = x, w  # g = w x
    return {"f": f, "df/dw": df_dg * dg_dw, "df/dx": df_dg * dg_dx, "df/db": df_db, "df/dg": df_dg}


def _by_differences(w: float, x: float, b: float) -> dict[str, float]:
    # A central difference of a linear f is exact, and dividing by a power of two does not round.
    h = 2.0**-10

    def slope(f: Callable[[float], float]) -> float:
        return (f(h) - f(-h)) / (2 * h)

    return {
        "f": w * x + b,
        "df/dw": slope(lambda h: (w + h) * x + b),
        "df/dx": slope(lambda h: w * (x + h) + b),
        "df/db": slope(lambda h: w * x + (b + h)),
        "df/dg": slope(lambda h: (w * x + h) + b),
    }


def _by_autograd(w: float, x: float, b: float, device: torch.device | str) -> dict[str, float]:
    leaves = [torch.tensor(value, device=device, requires_grad=True) for value in (w, x, b)]
    g = leaves[0] * leaves[1]
    f = g + leaves[2]
    derivatives = torch.autograd.grad(f, [*leaves, g])
    return {"f": f.item()} | {f"df/d{name}": value.item() for name, value in zip("wxbg", derivatives, strict=True)}


def _by_layer(w: float, x: float, b: float, layer: nn.Linear, call: Callable[[Tensor], Tensor]) -> dict[str, float]:
    with torch.no_grad():
        layer.weight.fill_(w)
        layer.bias.fill_(b)
    input = torch.full((1, 1), x, device=layer.weight.device, requires_grad=True)
    f = call(input)
    derivatives = torch.autograd.grad(f, [layer.weight, input, layer.bias])
    return {"f": f.item()} | {f"df/d{name}": value.item() for name, value in zip("wxb", derivatives, strict=True)}


def _intro() -> str:
    return page(
        "The chain rule: how much does f change when something inside it does? Multiply the slopes along the way.",
        """
        g = w x        dg/dw = x    dg/dx = w
        f = g + b      df/dg = 1    df/db = 1

        df/dw = df/dg dg/dw = x        df/dx = df/dg dg/dx = w
        """,
        "The same slopes by differences, by autograd, and by a layer of one input and one output without activation, "
        "as torch has it and fused. All numbers here are exact in binary, so they must be equal, not close.",
    )


def _report(result: ChainRule, view: View) -> str:
    rows = [["textbook", *(f"{value:g}" for value in result.reference.values())]]
    rows += [[way.name, *(number(way.values.get(name), "g") for name in result.reference)] for way in result.ways]
    times = [["", *(f"{us:.1f}" for us in result.us.values())]]
    timing = ["Microseconds for f and its slopes, the median:", *grid(["", *result.us], times)] if view.timing else []
    return sections(
        [f"At w = {result.w:g}, x = {result.x:g}, b = {result.b:g}:"],
        grid(["", *result.reference], rows),
        timing,
        ["All equal the textbook."] * result.matches,
    )


CHAIN_RULE = Lesson(
    name="chain-rule", summary="the slopes of f = w x + b", run=chain_rule, intro=_intro, report=_report
)
