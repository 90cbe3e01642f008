# SPDX-License-Identifier: Apache-2.0
"""The lesson of one step of backpropagation, worked on paper."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..functional import linear_sigmoid
from ..model import MLP
from .lesson import Count, Lesson
from .pictures import BLUE, INK, PALE_BLUE, Figure, new_figure
from .problem import Build, contenders, draw, own_defaults, table, unfused
from .race import FUSED, HAND, NN, FitCalls, Run, Task, race
from .text import View, fill, grid, number, page, sections, short_name, timing_table
from .values import Result, Values, value_misses

# Absolute. The table has eight decimals: half a unit of the last. In float32 numbers near 0.6 are 6e-8 apart.
WORKED_BANDS = {torch.float64: 5e-9, torch.float32: 2e-7}
WORKED_STEPS = 1000

# The table's keys, and the names that `_numbered` gives to the numbers under each.
WORKED = {"z_hidden": "z_h{}", "h": "h{}", "z_output": "z_o{}", "o": "o{}", "E": "E_o{}", "E_total": "E"}
WORKED |= {"dE_do1": "dE/do1", "do1_dz_o1": "do1/dz_o1", "dE_dW5": "dE/dW5"}
WORKED |= {"dE_o1_dh1": "dE_o1/dh1", "dE_o2_dh1": "dE_o2/dh1", "dE_dh1": "dE/dh1", "dh1_dz_h1": "dh1/dz_h1"}
WORKED |= {"dE_dW1": "dE/dW1"} | {f"W{i}_new": f"W{i} new" for i in (5, 1, 2, 3, 4)} | {"E_after": "E after"}


@dataclass(frozen=True)
class WorkedStep(Result):
    """What `worked_step` returns."""

    device: str
    x: list[float]
    target: list[float]
    weights: dict[str, float]  # W1 .. W8 before the step
    reference: dict[str, float]
    ways: tuple[Values, ...]  # in float64, then in float32; W6 .. W8 are not in the reference
    steps: int  # of the runs
    runs: tuple[Run, ...]  # the same network trained on, in float32; their losses are 2 E

    @property
    def misses(self) -> list[str]:
        """What lies outside WORKED_BANDS, one phrase for each."""
        return value_misses(self.reference, self.ways, lambda way: WORKED_BANDS[way.dtype] + 1e-15)


@own_defaults()
def worked_step(steps: int = WORKED_STEPS, device: torch.device | str = "cpu", *, progress: bool = False) -> WorkedStep:
    """One step of gradient descent on a 2-2-2 sigmoid network without biases: E = 1/2 sum (target - output)^2, lr 0.5.

    Forward values, the factors of the chain rule, gradients, the new weights and the error after the step, by hand, by
    autograd on nn.Linear + nn.Sigmoid, by the fused layers and by `fit`, in float64 and float32. Then the last three
    train for `steps` steps in float32, in turns as in `xor`. `fit` has no loss with a half in it; the half is in its
    learning rate: a step of 0.5 down E is one of 0.25 down 2 E = sum (target - output)^2.

    Raises ValueError for steps below 1.
    """
    given = table("worked_step_2-2-2")
    task = _task(given, torch.float32, device, steps)
    reference: dict[str, float] = {}
    for key, name in WORKED.items():
        reference |= _numbered(name, torch.tensor(given[key], dtype=torch.float64))
    ways = tuple(way for dtype in WORKED_BANDS for way in _ways(given, dtype, device))
    weights = _numbered("W{}", *(torch.tensor(given[key], dtype=torch.float64) for key in ("W_hidden", "W_output")))
    runs = race(task, contenders(task, partial(_network, given, torch.float32, device)), progress)
    return WorkedStep(str(device), given["x"], given["target"], weights, reference, ways, steps, runs)


def _ways(given: dict, dtype: torch.dtype, device: torch.device | str) -> Iterator[Values]:
    tensors = (torch.tensor(given[key], dtype=dtype) for key in ("x", "target", "W_hidden", "W_output"))
    yield Values(HAND, dtype, _by_hand(*tensors))

    task = _task(given, dtype, device, steps=1)
    for name, build in ((NN, unfused), (FUSED, MLP)):
        yield Values(name, dtype, _by_autograd(task.x[0], task.y[0], _network(given, dtype, device, build)))

    calls = FitCalls(_network(given, dtype, device, MLP), task)
    calls.take(turn=0, turns=1, steps=range(1))
    shown = {"E": calls.losses[0] / 2, "E after": _error(calls.model, task.x[0], task.y[0])}
    yield Values(calls.name, dtype, shown | _numbered("W{} new", *calls.model.parameters()))


def _task(given: dict, dtype: torch.dtype, device: torch.device | str, steps: int) -> Task:
    x, y = (torch.tensor([given[key]], dtype=dtype, device=device) for key in ("x", "target"))
    return Task(x, y, nn.MSELoss(reduction="sum"), partial(torch.optim.SGD, lr=0.25), steps, log_every=100)


def _network(given: dict, dtype: torch.dtype, device: torch.device | str, build: Build) -> nn.Sequential:
    model = draw(0, lambda: build([2, 2, 2], bias=False)).to(device, dtype)
    with torch.no_grad():
        for parameter, key in zip(model.parameters(), ("W_hidden", "W_output"), strict=True):
            parameter.copy_(torch.tensor(given[key], dtype=dtype))
    return model


def _by_hand(x: Tensor, target: Tensor, hidden: Tensor, output: Tensor) -> dict[str, float]:
    """x, target (2,), hidden, output (2, 2), whose rows are units: [[W1, W2], [W3, W4]] and [[W5, W6], [W7, W8]]."""

    def forward(hidden: Tensor, output: Tensor) -> tuple[Tensor, ...]:
        z_h = hidden @ x
        h = 1 / (1 + torch.exp(-z_h))
        z_o = output @ h
        o = 1 / (1 + torch.exp(-z_o))
        return z_h, h, z_o, o, (target - o) ** 2 / 2

    z_h, h, z_o, o, error = forward(hidden, output)

    do, slope_o = o - target, o * (1 - o)  # dE/do, do/dz_o
    doutput = torch.outer(do * slope_o, h)  # dz_o/dW = h
    parts = (do * slope_o)[:, None] * output  # of each output's error, by h
    dh, slope_h = parts.sum(0), h * (1 - h)  # a sum over the outputs, since h reaches each of them
    dhidden = torch.outer(dh * slope_h, x)
    factors = _factors(do, parts[:, 0], dh) | _slopes(slope_o, slope_h)
    weights = (hidden - 0.5 * dhidden, output - 0.5 * doutput)
    after = {"E after": forward(*weights)[-1].sum().item()}
    return _sums(z_h, z_o) | _named(h, o, error, (dhidden, doutput), weights) | factors | after


def _by_autograd(x: Tensor, target: Tensor, model: nn.Sequential) -> dict[str, float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    if isinstance(model, MLP):
        # A fused layer returns its activation and shows no z.
        hidden, output = model.parameters()
        h = linear_sigmoid(x, hidden)
        o, shown = linear_sigmoid(h, output), {}
    else:
        z_h = model[0](x)
        h = model[1](z_h)
        z_o = model[2](h)
        o = model[3](z_o)
        # Each output depends on its own z alone, so the sum of all has the slope of each.
        slopes = [torch.autograd.grad(y.sum(), z, retain_graph=True)[0] for y, z in ((o, z_o), (h, z_h))]
        shown = _sums(z_h, z_o) | _slopes(*slopes)
    error = (target - o) ** 2 / 2
    parts = torch.stack([torch.autograd.grad(e, h, retain_graph=True)[0][0] for e in error])
    do, dh = torch.autograd.grad(error.sum(), (o, h), retain_graph=True)
    error.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    optimizer.step()
    shown |= _factors(do, parts, dh) | {"E after": _error(model, x, target)}
    return shown | _named(h, o, error, gradients, model.parameters())


@torch.no_grad()
def _error(model: nn.Module, x: Tensor, target: Tensor) -> float:
    return ((target - model(x)) ** 2 / 2).sum().item()


def _factors(do: Tensor, parts: Tensor, dh: Tensor) -> dict[str, float]:
    """Of the chain rule, on the way to W5 and to W1; parts (2,): of each output's error by h1."""
    named = {"dE/do1": do[0], "dE_o1/dh1": parts[0], "dE_o2/dh1": parts[1], "dE/dh1": dh[0]}
    return {name: value.item() for name, value in named.items()}


def _slopes(output: Tensor, hidden: Tensor) -> dict[str, float]:
    return {"do1/dz_o1": output[0].item(), "dh1/dz_h1": hidden[0].item()}


def _sums(z_h: Tensor, z_o: Tensor) -> dict[str, float]:
    return _numbered("z_h{}", z_h) | _numbered("z_o{}", z_o)


def _named(h: Tensor, o: Tensor, error: Tensor, gradients: Iterable[Tensor], weights: Iterable[Tensor]):
    """The numbers of one step by name; error (2,): of each output."""
    values = _numbered("h{}", h) | _numbered("o{}", o) | _numbered("E_o{}", error) | {"E": error.sum().item()}
    return values | _numbered("dE/dW{}", *gradients) | _numbered("W{} new", *weights)


def _numbered(name: str, *values: Tensor) -> dict[str, float]:
    """The elements of all the values in turn; {} in the name is their number, from 1."""
    return {name.format(i): value for i, value in enumerate(torch.cat([v.flatten() for v in values]).tolist(), 1)}


def _intro(steps: int) -> str:
    return page(
        "One step of backpropagation, worked by hand: two inputs, two hidden units, two outputs, no biases.",
        """
        x1 0.1 ---W1 0.30--> h1 ---W5 0.45--> o1  target 0.4
               \\         ^     \\         ^
              W3 0.40  /     W7 0.70  /
                   \\  /           \\  /
                    /\\            /\\
                  /    \\        /    \\
              W2 0.25   v    W6 0.40   v
               /              /
        x2 0.2 ---W4 0.35--> h2 ---W8 0.60--> o2  target 0.6

        z_h1 = W1 x1 + W2 x2      h1 = sigmoid(z_h1)      and so on
        E_o1 = 1/2 (target1 - o1)^2      E = E_o1 + E_o2

        dE/dW5 = dE/do1 do1/dz_o1 h1
        dE/do1 = o1 - target1      do1/dz_o1 = o1 (1 - o1)

        dE/dW1 = dE/dh1 dh1/dz_h1 x1
        dE/dh1 = dE_o1/dh1 + dE_o2/dh1      dE_o1/dh1 = dE/do1 do1/dz_o1 W5
        dh1/dz_h1 = h1 (1 - h1)

        W new = W - 0.5 dE/dW
        """,
        "The slopes along a way are multiplied; where ways meet, as those from both outputs do in h1, they are added. "
        "The textbook worked this on paper to eight decimals. Beside it: the same formulas in torch (by hand), "
        "autograd on nn.Linear + nn.Sigmoid (nn), our fused layers (fused), which show no z, and `fit`, which shows "
        "the error and the new weights.",
    )


def _report(result: WorkedStep, view: View) -> str:
    ways = [way for way in result.ways if way.dtype == torch.float64]
    hand = ways[0].values
    rows = [
        [name, f"{result.reference[name]:.8f}", *(number(way.values.get(name), ".8f") for way in ways)]
        for name in result.reference
    ]
    weights = [
        [w, *(f"{v:.8f}" for v in (before, hand[f"dE/d{w}"], hand[f"{w} new"]))] for w, before in result.weights.items()
    ]
    parts = []
    for dtype, band in WORKED_BANDS.items():
        found = [item for way in result.ways if way.dtype == dtype for item in way.values.items()]
        largest = max(abs(value - result.reference[name]) for name, value in found if name in result.reference)
        parts.append(f"{largest:.1e} in {str(dtype).removeprefix('torch.')}, of {band:.0e} that rounding explains")
    verdict = " All match the textbook." if result.matches else ""
    before, after = hand["E"], hand["E after"]
    last = (result.steps - 1) // 100 * 100
    return sections(
        [
            f"x = {result.x}, target = {result.target}:",
            *grid(["", "textbook", *(short_name(w.name) for w in ways)], rows),
        ],
        [fill(f"Largest difference: {'; '.join(parts)}.{verdict}")],
        ["All eight weights:", *grid(["", "before", "dE/dW", "new"], weights)],
        [
            fill(
                f"The error E fell from {before:.8f} to {after:.8f}: the step went downhill. "
                + f"After {last:,} steps it is {result.runs[-1].losses[-1] / 2:.2e}." * (last > 0)
            )
        ],
        timing_table(view, result.runs),
    )


@dataclass(frozen=True)
class WorkedPicture:
    """What `plot_worked_step` draws."""

    weights: dict[str, tuple[float, float]]  # W1 .. W8: before and after the step
    units: dict[str, float]  # x1 .. o2: what each unit passes on
    errors: tuple[float, float]  # before and after the step


def plot_worked_step(result: WorkedStep) -> tuple[Figure, WorkedPicture]:
    """The network with its weights before and after the step. Raises ImportError if matplotlib is missing."""
    figure, hand = new_figure(10, 5.4), result.ways[0].values
    weights = {name: (old, hand[f"{name} new"]) for name, old in result.weights.items()}
    units = {f"x{i}": x for i, x in enumerate(result.x, 1)} | {name: hand[name] for name in ("h1", "h2", "o1", "o2")}
    data = WorkedPicture(weights, units, (hand["E"], hand["E after"]))
    axes = figure.subplots()
    places = {name: (4 * "xho".index(name[0]), 3 - 3 * int(name[1] == "2")) for name in units}
    ways = [(f"{before}{j}", f"{after}{i}") for before, after in ("xh", "ho") for i in (1, 2) for j in (1, 2)]
    middle: dict[str, Any] = {"ha": "center", "va": "center", "color": INK}
    for (start, end), (name, (old, new)) in zip(ways, weights.items(), strict=True):
        (x1, y1), (x2, y2) = places[start], places[end]
        arrow = {"arrowstyle": "->", "color": "0.6", "shrinkA": 26, "shrinkB": 26}
        axes.annotate("", (x2, y2), (x1, y1), arrowprops=arrow)
        # Beside the crossing of the two that are not level.
        share = 0.5 if y1 == y2 else 0.27
        at, white = (x1 + share * (x2 - x1), y1 + share * (y2 - y1)), {"fc": "white", "ec": "none", "pad": 1.5}
        axes.text(*at, f"{name} = {old:g}\n-> {new:.6f}", **middle, bbox=white)
    for name, (x, y) in places.items():
        axes.plot(x, y, "o", markersize=46, mfc=PALE_BLUE, mec=BLUE)
        axes.text(x, y, f"{name}\n{units[name]:.4g}", **middle)
    for i, target in enumerate(result.target):
        axes.text(9.1, 3 - 3 * i, f"target {target:g}", **middle)
    axes.set(xlim=(-0.7, 9.8), ylim=(-0.7, 3.7))
    axes.set_title("One step down: E = {:.8f} before it, {:.8f} after".format(*data.errors))
    axes.set_axis_off()
    return figure, data


WORKED_STEP = Lesson(
    name="worked-step",
    summary="one step of backpropagation in a 2-2-2 network, to eight decimals",
    run=worked_step,
    intro=_intro,
    report=_report,
    counts=(Count("steps", WORKED_STEPS),),
    plot=plot_worked_step,
    picture="the network, its weights before and after the step",
)
