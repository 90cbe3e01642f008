"""The lessons that work gradients out by hand and hold them against those of autograd and of the fused layers."""

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from .functional import linear_act
from .lesson_race import FUSED, NN, Loop, Run, Task, Trajectory, check_steps, draw, explained, fits, race, table
from .lesson_training import unfused, xor_data
from .model import MLP
from .training import fit

__all__ = [
    "HAND_BAND",
    "HAND_SEED",
    "HAND_STEPS",
    "SOLVED",
    "WORKED_BANDS",
    "WORKED_STEPS",
    "ByHand",
    "ChainRule",
    "Values",
    "WorkedStep",
    "by_hand",
    "chain_rule",
    "hand_gradients",
    "worked_step",
]

HAND = "by hand"

# Absolute. The table has eight decimals: half a unit of the last. In float32 numbers near 0.6 are 6e-8 apart.
WORKED_BANDS = {torch.float64: 5e-9, torch.float32: 2e-7}
WORKED_STEPS = 1000

HAND_SEED = 3
HAND_STEPS = 3801
# Relative. The 1e-7 in the hand's dL/dy moves its losses by 2e-5 over 3,801 steps in fp64; fp32 rounding, which the
# plateau near ln 2 amplifies, by as much again.
HAND_BAND = 2e-4
# A mean binary cross-entropy over four points below this proves that all four are on the right side of 0.5: one that
# is not costs at least ln 2, a quarter of which is this.
SOLVED = math.log(2) / 4


@dataclass(frozen=True)
class Values:
    """What one way of computing makes of the named quantities; those that it does not show are missing."""

    name: str
    path: str
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
    found = tuple(Values(name, "", torch.float32, way()) for name, way in ways.items())
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
    found = []
    for dtype in (torch.float64, torch.float32):
        x, target, hidden, output = (
            torch.tensor(given[key], dtype=dtype) for key in ("x", "target", "W_hidden", "W_output")
        )
        found.append(Values(HAND, "", dtype, _worked_by_hand(x, target, hidden, output)))
        for name, build in ((NN, unfused), (FUSED, MLP)):
            model = _worked_network(build, hidden, output).to(device)
            found.append(Values(name, "", dtype, _worked_by_autograd(x.to(device), target.to(device), model)))
        model = _worked_network(MLP, hidden, output).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        criterion = nn.MSELoss(reduction="sum")
        sample, goal = x[None].to(device), target[None].to(device)
        history = fit(model, sample, goal, criterion=criterion, optimizer=optimizer, steps=1, log_every=1)
        weights = _named_weights(*(p.detach() for p in model.parameters()))
        found.append(Values("fit", history.path, dtype, {"E": history.loss.item() / 2} | weights))
    # Only what the table has.
    found = tuple(replace(way, values={n: v for n, v in way.values.items() if n in reference}) for way in found)

    # In float32, the last dtype of the loop above.
    optimizer = partial(torch.optim.SGD, lr=0.25)
    task = Task(sample, goal, criterion, optimizer, steps, log_every=100)
    contenders = [
        Loop(name, _worked_network(build, hidden, output).to(device), task)
        for name, build in ((NN, unfused), (FUSED, MLP))
    ]
    runs = race(task, [*contenders, *fits(_worked_network(MLP, hidden, output).to(device), task)], progress)
    return WorkedStep(str(device), given["x"], given["target"], reference, found, steps, runs)


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


def _worked_network(build: Callable[..., nn.Sequential], hidden: Tensor, output: Tensor) -> nn.Sequential:
    model = draw(0, lambda: build([2, 2, 2], bias=False)).to(hidden.dtype)
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), (hidden, output), strict=True):
            parameter.copy_(weight)
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


# --- backpropagation written out -----------------------------------------------------------------------------


@dataclass(frozen=True)
class ByHand:
    """What `by_hand` returns."""

    trajectory: Trajectory  # the reference is the loss of the loop by hand, the first of the runs
    textbook: list[float | None]  # the table's loss at the logged steps, from weights that nobody knows
    names: list[str]  # of the parameters
    ratios: list[float]  # gradient by hand over autograd's of the mean loss, median over the elements of a parameter
    rates: list[float]  # of an ordinary optimizer that takes the same steps, by parameter

    @property
    def converged(self) -> bool:
        """Whether the last logged loss by hand is below SOLVED."""
        return self.trajectory.runs[0].losses[-1] < SOLVED

    @property
    def misses(self) -> list[str]:
        """What does not follow the loop by hand, one phrase for each, and whether that has converged."""
        trajectory = self.trajectory
        loss, step = trajectory.runs[0].losses[-1], trajectory.steps[-1]
        stuck = (
            [] if self.converged else [f"not converged: a loss of {loss:.4f} at step {step}, not below {SOLVED:.4f}"]
        )
        return stuck + trajectory.misses

    @property
    def matches(self) -> bool:
        return not self.misses


def by_hand(
    steps: int = HAND_STEPS, device: torch.device | str = "cpu", *, seed: int = HAND_SEED, progress: bool = False
) -> ByHand:
    """Trains a 2-2-1 sigmoid network on XOR by gradients written out in plain torch: `hand_gradients`, lr 0.5.

    They are not those of the mean loss: weights have the sum over the four samples, biases the mean. So an optimizer
    with a learning rate of 2 for weights and 0.5 for biases takes the same steps, and nn.Linear + nn.Sigmoid, the
    fused layers and `fit` do so, in turns as in `xor`. `fit` runs an ordinary loop for two groups of parameters.

    The table's weights came from uninitialized memory: its losses can be seen beside these, not reproduced.

    Raises ValueError for steps below 1.
    """
    check_steps(steps)
    x, y = (t.to(device) for t in xor_data())
    hand = _HandLoop(draw(seed, partial(MLP, [2, 2, 1])).to(device), Task(x, y, nn.BCELoss(), _two_rates, steps, 100))
    task = hand.task
    names, ratios = _compared(hand.model, x, y)

    def network(build: Callable[..., nn.Sequential]) -> nn.Module:
        return draw(seed, partial(build, [2, 2, 1])).to(device)

    loops = [Loop(NN, network(unfused), task), Loop(FUSED, network(MLP), task)]
    runs = race(task, [hand, *loops, *fits(network(MLP), task, calls=1)], progress)
    losses = dict(table("xor_by_hand")["loss"])
    groups = task.optimizer(hand.model.parameters()).param_groups
    rates = {id(p): group["lr"] for group in groups for p in group["params"]}
    trajectory = Trajectory(
        device=str(device),
        sizes=[2, 2, 1],
        steps=list(task.logged),
        reference=list(runs[0].losses),
        bands=[HAND_BAND] * len(task.logged),
        initial=network(MLP),
        runs=runs,
        samples=x.cpu(),
        targets=y.flatten().cpu(),
        points=x.cpu(),
        expected=None,
        prediction_band=HAND_BAND,
        explanation=explained([2, 2, 1], x),
    )
    textbook = [losses.get(step) for step in task.logged]
    return ByHand(trajectory, textbook, names, ratios, [rates[id(p)] for p in hand.model.parameters()])


def hand_gradients(
    x: Tensor, target: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """(y, [dweight1, dbias1, dweight2, dbias2]) by the conventions of the textbook's script.

    x (B, I), target (B, 1), weight1 (H, I), bias1 (H,), weight2 (1, H), bias2 (1,) -> y (B, 1). With the loss
    L = -target ln y - (1 - target) ln(1 - y) of a sample:

        dy = (y - target) / (y (1 - y) + 1e-7)       the 1e-7 keeps it finite
        dz2 = dy y (1 - y)                           almost y - target
        dz1 = (dz2 @ weight2) h (1 - h)
        dweight = dz.T @ (the layer's input)         summed over the batch
        dbias = mean of dz                           averaged over the batch
    """
    h = torch.sigmoid(x @ weight1.T + bias1)
    y = torch.sigmoid(h @ weight2.T + bias2)
    dy = (y - target) / (y * (1 - y) + 1e-7)
    dz2 = dy * y * (1 - y)
    dz1 = (dz2 @ weight2) * h * (1 - h)
    return y, [dz1.T @ x, dz1.mean(0), dz2.T @ h, dz2.mean(0)]


class _HandLoop(Loop):
    """Gradient descent by `hand_gradients`, with the model for a place to keep the parameters in."""

    def __init__(self, model: nn.Module, task: Task) -> None:
        super().__init__(HAND, model, task)
        self.parameters = [p.detach() for p in model.parameters()]

    def step(self) -> Tensor:
        x, target = self.task.x, self.task.y
        y, gradients = hand_gradients(x, target, *self.parameters)
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter -= 0.5 * gradient
        return -(target * torch.log(y) + (1 - target) * torch.log(1 - y)).mean()


def _two_rates(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    parameters = list(parameters)
    weights, biases = ([p for p in parameters if p.dim() == d] for d in (2, 1))
    return torch.optim.SGD([{"params": weights, "lr": 4 * 0.5}, {"params": biases, "lr": 0.5}])


def _compared(model: nn.Module, x: Tensor, y: Tensor) -> tuple[list[str], list[float]]:
    """The parameters' names, and the ratios of `ByHand`."""
    parameters = list(model.parameters())
    loss = nn.BCELoss()(model(x), y)
    own = torch.autograd.grad(loss, parameters)
    _, hand = hand_gradients(x, y, *(p.detach() for p in parameters))
    names = ["weight1", "bias1", "weight2", "bias2"]
    return names, [(h / o).median().item() for h, o in zip(hand, own, strict=True)]
