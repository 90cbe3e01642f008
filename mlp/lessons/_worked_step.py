"""The lesson of one step of backpropagation, worked on paper."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..functional import linear_sigmoid
from ..model import MLP
from .lesson import Count, Lesson
from .problem import Build, contenders, draw, table, unfused
from .race import FUSED, HAND, NN, FitCalls, Run, Task, race
from .text import fill, page, row, short_name, timing_table
from .values import Result, Values, value_misses

# Absolute. The table has eight decimals: half a unit of the last. In float32 numbers near 0.6 are 6e-8 apart.
WORKED_BANDS = {torch.float64: 5e-9, torch.float32: 2e-7}
WORKED_STEPS = 1000

# The table's keys, and the names that `_numbered` gives to the numbers under each.
WORKED = {"z_hidden": "z_h{}", "h": "h{}", "z_output": "z_o{}", "o": "o{}", "E": "E_o{}", "E_total": "E"}
WORKED |= {"dE_dW5": "dE/dW5", "dE_dW1": "dE/dW1"} | {f"W{i}_new": f"W{i} new" for i in (5, 1, 2, 3, 4)}


@dataclass(frozen=True)
class WorkedStep(Result):
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
        return value_misses(self.reference, self.ways, lambda way: WORKED_BANDS[way.dtype] + 1e-15)


def worked_step(steps: int = WORKED_STEPS, device: torch.device | str = "cpu", *, progress: bool = False) -> WorkedStep:
    """One step of gradient descent on a 2-2-2 sigmoid network without biases: E = 1/2 sum (target - output)^2, lr 0.5.

    Forward values, two of the gradients and five of the new weights, by hand, by autograd on nn.Linear + nn.Sigmoid,
    by the fused layers and by `fit`, in float64 and float32. Then the last three train for `steps` steps in float32,
    in turns as in `xor`, to compare their times. `fit` has no loss with a half in it; the half is in its learning
    rate: a step of 0.5 down E is one of 0.25 down 2 E = sum (target - output)^2.

    Raises ValueError for steps below 1.
    """
    given = table("worked_step_2-2-2")
    task = _task(given, torch.float32, device, steps)
    reference: dict[str, float] = {}
    for key, name in WORKED.items():
        reference |= _numbered(name, torch.tensor(given[key], dtype=torch.float64))
    ways = (way for dtype in WORKED_BANDS for way in _ways(given, dtype, device))
    shown = tuple(
        replace(way, values={name: way.values[name] for name in reference if name in way.values}) for way in ways
    )
    runs = race(task, contenders(task, partial(_network, given, torch.float32, device)), progress)
    return WorkedStep(str(device), given["x"], given["target"], reference, shown, steps, runs)


def _ways(given: dict, dtype: torch.dtype, device: torch.device | str) -> Iterator[Values]:
    tensors = (torch.tensor(given[key], dtype=dtype) for key in ("x", "target", "W_hidden", "W_output"))
    yield Values(HAND, dtype, _by_hand(*tensors))

    task = _task(given, dtype, device, steps=1)
    for name, build in ((NN, unfused), (FUSED, MLP)):
        yield Values(name, dtype, _by_autograd(task.x[0], task.y[0], _network(given, dtype, device, build)))

    calls = FitCalls(_network(given, dtype, device, MLP), task)
    calls.take(turn=0, turns=1, steps=range(1))
    yield Values(calls.name, dtype, {"E": calls.losses[0] / 2} | _numbered("W{} new", *calls.model.parameters()))


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
    z_h = hidden @ x
    h = 1 / (1 + torch.exp(-z_h))
    z_o = output @ h
    o = 1 / (1 + torch.exp(-z_o))
    error = (target - o) ** 2 / 2

    dz_o = (o - target) * o * (1 - o)  # dE/do = o - target, do/dz = o (1 - o)
    doutput = torch.outer(dz_o, h)  # dz_o/dW = h
    dh = output.T @ dz_o  # a sum over the outputs, since h reaches each of them
    dz_h = dh * h * (1 - h)
    dhidden = torch.outer(dz_h, x)
    weights = (hidden - 0.5 * dhidden, output - 0.5 * doutput)
    return _sums(z_h, z_o) | _named(h, o, error, (dhidden, doutput), weights)


def _by_autograd(x: Tensor, target: Tensor, model: nn.Sequential) -> dict[str, float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    if isinstance(model, MLP):
        # A fused layer returns its activation and shows no z.
        hidden, output = model.parameters()
        h = linear_sigmoid(x, hidden)
        o, sums = linear_sigmoid(h, output), {}
    else:
        z_h = model[0](x)
        h = model[1](z_h)
        z_o = model[2](h)
        o, sums = model[3](z_o), _sums(z_h, z_o)
    error = (target - o) ** 2 / 2
    error.sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    optimizer.step()
    return sums | _named(h, o, error, gradients, model.parameters())


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
        "One step of backpropagation, worked by hand: two inputs, two hidden units, two outputs, no biases. W1..W4 "
        "lead to the hidden units, [[W1, W2], [W3, W4]], and W5..W8 to the outputs.",
        """
        z_h = W_hidden x      h = sigmoid(z_h)      z_o = W_output h      o = sigmoid(z_o)
        E = 1/2 sum (target - o)^2

        dE/dz_o = (o - target) o (1 - o)                          dE/dW_output = dE/dz_o h'
        dE/dz_h = (W_output' dE/dz_o) h (1 - h)                   dE/dW_hidden = dE/dz_h x'
        W new = W - 0.5 dE/dW
        """,
        "(' is the transpose.) The table was worked on paper to eight decimals. A fused layer shows no z, and `fit` "
        f"only E and the new weights. Below, the same network trains on for {steps:,} steps to compare times.",
    )


def _report(result: WorkedStep) -> str:
    ways = [way for way in result.ways if way.dtype == torch.float64]
    lines = [f"x = {result.x}, target = {result.target}, in float64:", ""]
    lines.append(row(f"  {'':8}", ["reference", *(short_name(way.name) for way in ways)], 12))
    for name, reference in result.reference.items():
        lines.append(row(f"  {name:8}", [reference, *(way.values.get(name) for way in ways)], 12, ".8f"))
    parts = []
    for dtype, band in WORKED_BANDS.items():
        found = [item for way in result.ways if way.dtype == dtype for item in way.values.items()]
        largest = max(abs(value - result.reference[name]) for name, value in found)
        parts.append(f"{largest:.1e} in {str(dtype).removeprefix('torch.')} (band {band:.0e})")
    verdict = " All match the reference." if result.matches else ""
    lines += ["", fill(f"Largest difference: {', '.join(parts)}.{verdict}"), ""]
    head = f"E at step {(result.steps - 1) // 100 * 100:,}"
    title = f"in float32, {result.steps:,} steps"
    lines += timing_table(title, f"{head:>18}", lambda run: f"{run.losses[-1] / 2:18.8e}", result.runs)
    return "\n".join(lines)


WORKED_STEP = Lesson(
    name="worked-step",
    summary="one step of backpropagation in a 2-2-2 network, to eight decimals",
    run=worked_step,
    intro=_intro,
    report=_report,
    counts=(Count("steps", WORKED_STEPS),),
)
