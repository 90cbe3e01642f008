"""The lessons that work gradients out on paper and hold them against those of autograd and of the fused layers."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from .functional import linear_act
from .lesson_race import FUSED, HAND, NN, FitCalls, Loop, Run, Task, check_steps, draw, fits, race, table
from .lesson_training import unfused
from .model import MLP

__all__ = [
    "WORKED_BANDS",
    "WORKED_STEPS",
    "ChainRule",
    "Values",
    "WorkedStep",
    "chain_rule",
    "worked_step",
]

# Absolute. The table has eight decimals: half a unit of the last. In float32 numbers near 0.6 are 6e-8 apart.
WORKED_BANDS = {torch.float64: 5e-9, torch.float32: 2e-7}
WORKED_STEPS = 1000


@dataclass(frozen=True)
class Values:
    """What one way of computing makes of the named quantities; those that it does not show are missing."""

    name: str
    dtype: torch.dtype
    values: dict[str, float]


def _misses(reference: dict[str, float], found: Sequence[Values], band: Callable[[Values], float]) -> list[str]:
    return [
        f"{way.name} in {str(way.dtype).removeprefix('torch.')}: {name} = {value:.10g} and not {reference[name]:.10g}"
        for way in found
        for name, value in way.values.items()
        if not abs(value - reference[name]) <= band(way)
    ]


# --- the chain rule ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChainRule:
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
        return _misses(self.reference, self.ways, lambda way: 0.0)

    @property
    def matches(self) -> bool:
        return not self.misses


def chain_rule(device: torch.device | str = "cpu") -> ChainRule:
    """The derivatives of f = w x + b, with g = w x: by the chain rule, by differences, by autograd, by a fused layer.

    The fused layer has one input, one output and no activation. It shows no g; differences and autograd do.
    """
    given = table("chain_rule")
    w, x, b = (float(given[name]) for name in "wxb")
    reference = {"f": given["f"]} | {f"df/d{name}": given[f"df_d{name}"] for name in "wxbg"}
    layer = draw(0, lambda: nn.Linear(1, 1)).to(device)
    ways: dict[str, Callable[[], dict[str, float]]] = {
        HAND: partial(_chain_by_hand, w, x, b),
        "differences": partial(_chain_by_differences, w, x, b),
        "autograd": partial(_chain_by_autograd, w, x, b, device),
        "nn.Linear": partial(_chain_by_layer, w, x, b, layer, layer),
        FUSED: partial(_chain_by_layer, w, x, b, layer, lambda x: _bare(x, layer)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(20):
        for name, way in ways.items():
            began = time.perf_counter()
            for _ in range(10):
                way()
            seconds[name].append((time.perf_counter() - began) / 10)
    found = tuple(Values(name, torch.float32, way()) for name, way in ways.items())
    return ChainRule(w, x, b, reference, found, {name: 1e6 * statistics.median(s) for name, s in seconds.items()})


def _bare(x: Tensor, layer: nn.Linear) -> Tensor:
    return linear_act(x, layer.weight, layer.bias, "identity")


def _chain_by_hand(w: float, x: float, b: float) -> dict[str, float]:
    g = w * x
    f = g + b
    df_dg, df_db = 1.0, 1.0  # f = g + b
    dg_dw, dg_dx = x, w  # g = w x
    return {"f": f, "df/dw": df_dg * dg_dw, "df/dx": df_dg * dg_dx, "df/db": df_db, "df/dg": df_dg}


def _chain_by_differences(w: float, x: float, b: float) -> dict[str, float]:
    # f is linear in each argument, so a central difference has no error of its own; 1/1024 adds none of rounding.
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


def _chain_by_autograd(w: float, x: float, b: float, device: torch.device | str) -> dict[str, float]:
    leaves = [torch.tensor(value, device=device, requires_grad=True) for value in (w, x, b)]
    g = leaves[0] * leaves[1]
    f = g + leaves[2]
    derivatives = torch.autograd.grad(f, [*leaves, g])
    return {"f": f.item()} | {f"df/d{name}": value.item() for name, value in zip("wxbg", derivatives, strict=True)}


def _chain_by_layer(
    w: float, x: float, b: float, layer: nn.Linear, call: Callable[[Tensor], Tensor]
) -> dict[str, float]:
    with torch.no_grad():
        layer.weight.fill_(w)
        layer.bias.fill_(b)
    input = torch.full((1, 1), x, device=layer.weight.device, requires_grad=True)
    f = call(input)
    derivatives = torch.autograd.grad(f, [layer.weight, input, layer.bias])
    return {"f": f.item()} | {f"df/d{name}": value.item() for name, value in zip("wxb", derivatives, strict=True)}


# --- one step of a 2-2-2 network -----------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkedStep:
    """What `worked_step` returns."""

    device: str
    x: list[float]
    target: list[float]
    reference: dict[str, float]
    ways: tuple[Values, ...]  # in float64, then in float32
    steps: int  # of the runs
    runs: tuple[Run, ...]  # the same network trained on, in float32; their losses are 2 E

    @property
    def misses(self) -> list[str]:
        """What lies outside WORKED_BANDS, one phrase for each."""
        return _misses(self.reference, self.ways, lambda way: WORKED_BANDS[way.dtype] + 1e-15)

    @property
    def matches(self) -> bool:
        return not self.misses


def worked_step(steps: int = WORKED_STEPS, device: torch.device | str = "cpu", *, progress: bool = False) -> WorkedStep:
    """One step of gradient descent on a 2-2-2 sigmoid network without biases: E = 1/2 sum (target - output)^2, lr 0.5.

    Forward values, two of the gradients and five of the new weights, by hand, by autograd on nn.Linear + nn.Sigmoid,
    by the fused layers and by `fit`, in float64 and float32. Then the last three train for `steps` steps in float32,
    in turns as in `xor`, to compare their times. `fit` has no loss with a half in it; the half is in its learning
    rate: a step of 0.5 down E is one of 0.25 down 2 E = sum (target - output)^2.

    Raises ValueError for steps below 1.
    """
    check_steps(steps)
    given = table("worked_step_2-2-2")
    reference = {
        name: value
        for key, names in _WORKED.items()
        for name, value in zip(names, given[key] if isinstance(given[key], list) else [given[key]], strict=True)
    }
    ways = tuple(way for dtype in WORKED_BANDS for way in _worked_ways(given, dtype, device))
    shown = ({name: value for name, value in way.values.items() if name in reference} for way in ways)
    ways = tuple(replace(way, values=values) for way, values in zip(ways, shown, strict=True))

    task = _worked_task(given, torch.float32, device, steps)
    nn_loop, fused_loop = (
        Loop(name, _worked_network(build, given, torch.float32, device), task)
        for name, build in ((NN, unfused), (FUSED, MLP))
    )
    calls = fits(_worked_network(MLP, given, torch.float32, device), task)
    runs = race(task, [nn_loop, fused_loop, *calls], progress)
    return WorkedStep(str(device), given["x"], given["target"], reference, ways, steps, runs)


# The table's keys, and the names of the numbers under each.
_WORKED = {
    "z_hidden": ("z_h1", "z_h2"),
    "h": ("h1", "h2"),
    "z_output": ("z_o1", "z_o2"),
    "o": ("o1", "o2"),
    "E": ("E_o1", "E_o2"),
    "E_total": ("E",),
    "dE_dW5": ("dE/dW5",),
    "dE_dW1": ("dE/dW1",),
    "W5_new": ("W5 new",),
    "W1_new": ("W1 new",),
    "W2_new": ("W2 new",),
    "W3_new": ("W3 new",),
    "W4_new": ("W4 new",),
}


def _worked_ways(given: dict, dtype: torch.dtype, device: torch.device | str) -> Iterator[Values]:
    tensors = (torch.tensor(given[key], dtype=dtype) for key in ("x", "target", "W_hidden", "W_output"))
    yield Values(HAND, dtype, _worked_by_hand(*tensors))

    task = _worked_task(given, dtype, device, steps=1)
    for name, build in ((NN, unfused), (FUSED, MLP)):
        model = _worked_network(build, given, dtype, device)
        yield Values(name, dtype, _worked_by_autograd(task.x[0], task.y[0], model))

    calls = FitCalls(_worked_network(MLP, given, dtype, device), task)
    calls.take(turn=0, turns=1, steps=range(1))
    yield Values(calls.name, dtype, {"E": calls.losses[0] / 2} | _named_weights(*calls.model.parameters()))


def _worked_task(given: dict, dtype: torch.dtype, device: torch.device | str, steps: int) -> Task:
    x, y = (torch.tensor([given[key]], dtype=dtype, device=device) for key in ("x", "target"))
    return Task(x, y, nn.MSELoss(reduction="sum"), partial(torch.optim.SGD, lr=0.25), steps, log_every=100)


def _worked_network(
    build: Callable[..., nn.Sequential], given: dict, dtype: torch.dtype, device: torch.device | str
) -> nn.Sequential:
    model = draw(0, lambda: build([2, 2, 2], bias=False)).to(device, dtype)
    with torch.no_grad():
        for parameter, key in zip(model.parameters(), ("W_hidden", "W_output"), strict=True):
            parameter.copy_(torch.tensor(given[key], dtype=dtype))
    return model


def _worked_by_hand(x: Tensor, target: Tensor, hidden: Tensor, output: Tensor) -> dict[str, float]:
    """x, target (2,), hidden, output (2, 2), whose rows are units: [[W1, W2], [W3, W4]] and [[W5, W6], [W7, W8]]."""
    z_h = hidden @ x
    h = 1 / (1 + torch.exp(-z_h))
    z_o = output @ h
    o = 1 / (1 + torch.exp(-z_o))
    error = (target - o) ** 2 / 2

    dz_o = (o - target) * o * (1 - o)  # dE/do = o - target, do/dz = o (1 - o)
    doutput = torch.outer(dz_o, h)  # dz_o/dW = h
    dh = output.T @ dz_o  # every output that h reaches
    dz_h = dh * h * (1 - h)
    dhidden = torch.outer(dz_h, x)
    return {
        **_pair("z_h", z_h),
        **_pair("h", h),
        **_pair("z_o", z_o),
        **_pair("o", o),
        **_pair("E_o", error),
        "E": error.sum().item(),
        **_named_gradients(dhidden, doutput),
        **_named_weights(hidden - 0.5 * dhidden, output - 0.5 * doutput),
    }


def _worked_by_autograd(x: Tensor, target: Tensor, model: nn.Sequential) -> dict[str, float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    z_h = model[0](x)
    h = model[1](z_h)
    z_o = model[2](h)
    o = model[3](z_o)
    error = (target - o) ** 2 / 2
    error.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    optimizer.step()
    # A fused layer shows no z.
    sums = {} if isinstance(model[1], nn.Identity) else _pair("z_h", z_h) | _pair("z_o", z_o)
    return {
        **sums,
        **_pair("h", h),
        **_pair("o", o),
        **_pair("E_o", error),
        "E": error.sum().item(),
        **_named_gradients(*gradients),
        **_named_weights(*model.parameters()),
    }


def _pair(name: str, values: Tensor) -> dict[str, float]:
    return {f"{name}{i}": value for i, value in enumerate(values.tolist(), 1)}


def _named_gradients(dhidden: Tensor, doutput: Tensor) -> dict[str, float]:
    flat = [*dhidden.flatten().tolist(), *doutput.flatten().tolist()]
    return {f"dE/dW{i}": value for i, value in enumerate(flat, 1)}


def _named_weights(hidden: Tensor, output: Tensor) -> dict[str, float]:
    flat = [*hidden.flatten().tolist(), *output.flatten().tolist()]
    return {f"W{i} new": value for i, value in enumerate(flat, 1)}
