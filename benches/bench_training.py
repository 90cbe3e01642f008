# SPDX-License-Identifier: Apache-2.0
"""Whole training loops: what a step of one network costs, by every means, checked before it is timed.

usage: pytest benches/bench_training.py [--benchmark-json=FILE] [-k EXPRESSION] [--suite-quick] ...
       pytest benches/bench_training.py --benchmark-disable      checks everything, times nothing

A net-step is one step of one network: a step of an ensemble of 1,024 counts 1,024. pytest-benchmark times each
contender by itself, per call, which takes `steps_per_call` steps. The figures to compare are in `extra_info`, from one
interleaved measurement per case:

    us_per_net_step         median
    speedup_over_eager      median over the rounds of the ratio within a round, per net-step
    speedup_over_jax        the same over JAX, where it is installed
    first_call_seconds      of compiling or loading before the first step, in none of the other figures
    spread                  interquartile range over median: beyond a few percent, the machine was busy
"""

import contextlib
import copy
import importlib.util
import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np
import pytest
import timing
import torch
from contenders import capture
from torch import Tensor, nn

from perceptriton.mlp import Ensemble, fit

pytestmark = pytest.mark.filterwarnings("default")  # compilers warn about settings that are not theirs to choose

# What fp32's own rounding may add to twice the error of the eager loop, as a relative norm.
FLOOR = 2e-6
CHECKED_STEPS, CHECKED_MEMBERS = 10, 4
SEQUENTIAL_MEMBERS = 32  # more networks than that one after the other cost no less each
CALL_SECONDS = 0.1  # of a contender, so that what a call of fit costs by itself is a small part
COMPILED_IN_SMOKE_RUN = ("xor",)  # compiling takes seconds: where nothing is timed, this is proof enough


@dataclass(frozen=True)
class Case:
    name: str
    sizes: tuple[int, ...]
    samples: int
    batch_size: int | None = None
    members: int | None = None  # None: one network, not an ensemble
    lr: float = 1.0
    optimizer: str = "SGD"
    devices: tuple[str, ...] = ("cpu", "cuda")
    classes: bool = False  # targets are class ids, and the loss is their cross entropy
    sweep: bool = False  # members have rates of their own, from half of lr to one and a half times lr
    ways: bool = False  # a block of programs and a captured graph are timed too, whichever `fit` chooses

    @property
    def nets(self) -> int:
        return self.members or 1


CASES = (
    # One network: calls cost more than what they compute.
    Case("xor", (2, 2, 1), 4),
    Case("xor-adam", (2, 2, 1), 4, lr=0.01, optimizer="Adam"),
    Case("xor-deep", (2, 10, 10, 10, 1), 4),
    # The report that started this: 50,000 steps took 47 s on a GPU and 26 s in numpy.
    Case("forum", (32, 64, 5), 256, lr=0.1, ways=True),
    # From where a batch is large enough for a graph of products.
    *(Case(f"batch-{n}", (32, 64, 5), n, lr=0.1, devices=("cuda",), ways=True) for n in (1024, 4096, 16_384, 65_536)),
    # Data that are fetched at every step.
    Case("digits", (784, 32, 10), 2048, batch_size=64, lr=0.1),
    # From where members pay for each other's calls to where their arithmetic counts.
    *(Case(f"xor-{members}", (2, 2, 1), 4, members=members) for members in (1, 64, 1024, 8192)),
    Case("minibatches-1024", (4, 16, 3), 512, batch_size=32, members=1024, lr=0.1, devices=("cpu",)),
    # What a researcher does: seeds times rates, on XOR and on classes.
    Case("sweep-12000", (2, 2, 1), 4, members=12_000, sweep=True),
    Case("classes-1000", (8, 16, 3), 512, batch_size=64, members=1000, lr=0.1, classes=True, sweep=True),
    *(Case(f"xor-{members}", (2, 2, 1), 4, members=members, devices=("cuda",)) for members in (16_384, 131_072)),
)
# As in stack_cases.py: on a GPU, what has a target comes first.
FIRST = ("xor", "xor-131072", "xor-deep", "xor-16384", "forum", "digits", "batch-4096", "batch-65536")


class Problem:
    def __init__(self, case: Case, device: str, dtype: torch.dtype = torch.float32) -> None:
        self.case, self.dtype = case, dtype
        generator = torch.Generator().manual_seed(0)
        output = "identity" if case.classes else "sigmoid"
        ensemble = Ensemble(case.nets, case.sizes, "sigmoid", output, generator=generator)
        with torch.no_grad():
            for p in ensemble.parameters():
                p.mul_(2)  # gradients of default-initialized networks are so small that zeros would pass
        self.ensemble = ensemble.to(device, dtype)
        self.x = torch.randn(case.samples, case.sizes[0], generator=generator).to(device, dtype)
        self.y = torch.rand(case.samples, case.sizes[-1], generator=generator).to(device, dtype)
        self.y = self.y.argmax(1) if case.classes else self.y
        self.criterion = nn.CrossEntropyLoss() if case.classes else nn.BCELoss()
        share = torch.linspace(0.5, 1.5, case.nets) if case.sweep else torch.ones(case.nets)
        self.rates = (case.lr * share).to(device, dtype)

    def optimizer(self, parameters, member: int = 0) -> torch.optim.Optimizer:
        return getattr(torch.optim, self.case.optimizer)(parameters, lr=self.rates[member].item())

    def orders(self) -> Iterator[Tensor]:
        """The samples of each minibatch, the same for all contenders."""
        generator = torch.Generator().manual_seed(1)
        while True:
            yield from torch.randperm(self.case.samples, generator=generator).split(self.case.batch_size)

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self.case.batch_size is None:
            return itertools.repeat((self.x, self.y))
        return ((self.x[rows], self.y[rows]) for rows in self.orders())


@dataclass
class Contender:
    """`advance(steps)` trains on; `parameters()` are those of the first members, stacked."""

    advance: Callable[[int], object]
    parameters: Callable[[], list[Tensor]]
    nets: int  # that a step trains
    first_call: Callable[[], float] = lambda: 0.0  # seconds that the first call took besides its steps


def plain(model: nn.Module) -> nn.Sequential:
    """The same network from torch's own modules."""
    layers = [m for m in model if isinstance(m, nn.Linear)]
    modules = [m for l in layers for m in (nn.Linear(l.in_features, l.out_features), nn.Sigmoid())]
    modules = modules if isinstance(model[-1], nn.Sigmoid) else modules[:-1]
    twin = nn.Sequential(*modules).to(layers[0].weight.device, layers[0].weight.dtype)
    twin.load_state_dict(model.state_dict())
    return twin


def eager(problem: Problem, compiled: bool = False, most: int = SEQUENTIAL_MEMBERS) -> Contender:
    """The loop that everyone writes; for an ensemble, its networks take turns."""
    count = min(problem.case.nets, most)
    models = [plain(problem.ensemble.member(i)) for i in range(count)]
    optimizers = [problem.optimizer(model.parameters(), i) for i, model in enumerate(models)]
    criterion = problem.criterion
    # fullgraph: without it, whatever the compiler gives up on would be timed as eager code under its name.
    calls = [torch.compile(m, fullgraph=True, dynamic=False) if compiled else m for m in models]
    batches = problem.batches()

    def advance(steps: int) -> None:
        for _ in range(steps):
            x, y = next(batches)
            for call, optimizer in zip(calls, optimizers, strict=True):
                optimizer.zero_grad()
                loss = criterion(call(x), y)
                loss.backward()
                optimizer.step()

    return Contender(advance, lambda: stacked(Ensemble.from_models(models)), count)


def fitted(problem: Problem, impl: str | None = None) -> Contender:
    ensemble = copy.deepcopy(problem.ensemble)
    model = ensemble if problem.case.members else ensemble.member(0)
    options = {"criterion": problem.criterion, "optimizer": problem.optimizer(model.parameters())}
    options |= {"lr": problem.rates} if problem.case.sweep else {}
    options |= {"batch_size": problem.case.batch_size, "generator": torch.Generator().manual_seed(1)}
    options |= {"impl": impl} if impl else {}
    setup = 0.0
    if not (problem.x.is_cuda or impl):
        # Calls this short would not wait for compiled loops. They are there after the first long one.
        with contextlib.suppress(NotImplementedError):
            twin = copy.deepcopy(model)
            own = options | {"optimizer": problem.optimizer(twin.parameters()), "generator": torch.Generator()}
            setup = fit(twin, problem.x, problem.y, steps=1, impl="native", **own).setup_seconds
    return Contender(
        lambda steps: fit(model, problem.x, problem.y, steps=steps, **options),
        lambda: stacked(model if isinstance(model, Ensemble) else Ensemble.from_models([model])),
        problem.case.nets,
        lambda: setup,
    )


def vmapped(problem: Problem) -> Contender:
    """An ensemble by torch.func, as its tutorial does it, with the update in place."""
    skeleton = plain(problem.ensemble.member(0)).to("meta")
    names = [name for name, _ in skeleton.named_parameters()]
    parameters = {name: p.clone() for name, p in zip(names, parameters_of(problem.ensemble), strict=True)}

    def loss(parameters, x, y):
        return problem.criterion(torch.func.functional_call(skeleton, parameters, (x,)), y)

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(0, None, None))
    batches = problem.batches()

    def advance(steps: int) -> None:
        for _ in range(steps):
            for p, gradient in zip(parameters.values(), gradients(parameters, *next(batches)).values(), strict=True):
                if problem.case.sweep:
                    p.addcmul_(gradient, problem.rates.view(-1, *[1] * (p.dim() - 1)), value=-1)
                else:
                    p.sub_(gradient, alpha=problem.case.lr)

    return Contender(advance, lambda: [p[:CHECKED_MEMBERS] for p in parameters.values()], problem.case.nets)


def jitted(problem: Problem) -> Contender:
    """JAX, where it is installed."""
    import jax_loops

    case = problem.case

    def make(loss: Callable) -> "jax_loops.Loop":
        arrays = [(p if case.members else p[0]).numpy() for p in parameters_of(problem.ensemble)]
        layers = list(zip(arrays[::2], arrays[1::2], strict=True))
        # A shorter last batch of an epoch would be compiled by itself: no case has one.
        order = (rows.numpy() for rows in problem.orders()) if case.batch_size else None
        rates = problem.rates.numpy() if case.sweep else case.lr
        data = (problem.x.numpy(), problem.y.numpy().astype("int32") if case.classes else problem.y.numpy())
        return jax_loops.Loop(loss, layers, *data, order, case.optimizer, rates, case.members is not None)

    losses = jax_loops.OF_CLASSES if case.classes else jax_loops.LOSSES
    loop = jax_loops.faster(make, losses, max(1, 1000 // case.nets))

    def parameters() -> list[Tensor]:
        found = [torch.from_numpy(np.array(p)) for layer in loop.layers for p in layer]
        return [p[:CHECKED_MEMBERS] if case.members else p[None] for p in found]

    return Contender(loop.advance, parameters, case.nets, lambda: loop.first_call)


def in_skorch(problem: Problem) -> Contender:
    """Steps of skorch, where it is installed, without its loader and its epochs: its networks take turns."""
    from skorch import NeuralNet

    nets = []
    for i in range(min(problem.case.nets, SEQUENTIAL_MEMBERS)):
        options = {"optimizer": getattr(torch.optim, problem.case.optimizer), "lr": problem.rates[i].item()}
        options |= {"criterion": type(problem.criterion), "train_split": None, "verbose": 0}
        nets.append(NeuralNet(plain(problem.ensemble.member(i)), **options).initialize())
    batches = problem.batches()

    def advance(steps: int) -> None:
        for _ in range(steps):
            batch = next(batches)
            for net in nets:
                net.train_step(batch)

    return Contender(advance, lambda: stacked(Ensemble.from_models([net.module_ for net in nets])), len(nets))


def captured(problem: Problem) -> Contender:
    """The eager step in a CUDA graph, on the whole data at each step."""
    model = plain(problem.ensemble.member(0))
    optimizer, criterion = problem.optimizer(model.parameters()), nn.BCELoss()

    def step() -> None:
        optimizer.zero_grad()
        criterion(model(problem.x), problem.y).backward()
        optimizer.step()

    before = copy.deepcopy(model.state_dict())
    graph, _ = capture(step)
    model.load_state_dict(before)  # in place: what the graph reads

    def advance(steps: int) -> None:
        for _ in range(steps):
            graph.replay()

    return Contender(advance, lambda: stacked(Ensemble.from_models([model])), 1)


def parameters_of(ensemble: Ensemble) -> list[Tensor]:
    """The weight and the bias of each layer in turn, with a leading dimension of the members."""
    return [p.detach() for pair in zip(ensemble.weights, ensemble.biases, strict=True) for p in pair]


def stacked(ensemble: Ensemble) -> list[Tensor]:
    return [p[:CHECKED_MEMBERS] for p in parameters_of(ensemble)]


@dataclass(frozen=True)
class Impl:
    label: str
    build: Callable[[Problem], Contender]
    takes: Callable[[Case], bool] = lambda case: True
    devices: tuple[str, ...] = ("cpu", "cuda")


BASELINE, JUDGED = "eager", "fit"
IMPLS = {
    "eager": Impl("eager loop", eager),
    "fit": Impl("perceptriton fit", fitted),
    "compiled": Impl("torch.compile", lambda problem: eager(problem, True), lambda case: case.members is None),
    "vmap": Impl("torch.func.vmap", vmapped, lambda case: case.members is not None),
    **({"jax": Impl("JAX", jitted, devices=("cpu",))} if importlib.util.find_spec("jax") else {}),
    **({"skorch": Impl("skorch", in_skorch, lambda case: case.sweep)} if importlib.util.find_spec("skorch") else {}),
    # SGD alone: of the others a graph would freeze the number of the step.
    "graph": Impl(
        "eager in a CUDA graph",
        captured,
        lambda case: case.members is None and case.batch_size is None and case.optimizer == "SGD",
        ("cuda",),
    ),
    **{
        f"fit-{impl}": Impl(f"fit, {impl}", partial(fitted, impl=impl), lambda case: case.ways, ("cuda",))
        for impl in ("block", "graph")
    },
}


def pytest_generate_tests(metafunc):
    device = metafunc.config.getoption("--suite-device")
    names = {name: turn for turn, name in enumerate(FIRST if device == "cuda" else ())}
    parameters = [
        pytest.param(impl, case, id=f"{case.name}-{impl}")
        for case in sorted(CASES, key=lambda case: names.get(case.name, len(FIRST)))
        for impl, record in IMPLS.items()
        if record.takes(case) and device in case.devices and device in record.devices
    ]
    metafunc.parametrize(("impl", "case"), parameters)


def relative_error(actual: list[Tensor], truth: list[Tensor]) -> float:
    a, t = (torch.cat([p.double().flatten() for p in parameters]) for parameters in (actual, truth))
    if a.shape != t.shape:
        raise ArithmeticError(f"{len(a)} parameters, not {len(t)}")
    return ((a - t).norm() / t.norm()).item()


class Group:
    """The contenders of one case, each checked when it is built."""

    def __init__(self, case: Case, impls: list[str], device: str, quick: bool) -> None:
        self.case, self.impls, self.device, self.quick = case, impls, device, quick
        self.truth = self._after(eager(Problem(case, device, torch.float64), most=CHECKED_MEMBERS))
        found = self._after(eager(Problem(case, device), most=CHECKED_MEMBERS))
        self.bound = 2 * relative_error(found, self.truth) + FLOOR
        self.built: dict[str, Contender] = {}
        self.errors: dict[str, float] = {}

    @staticmethod
    def _after(contender: Contender) -> list[Tensor]:
        contender.advance(CHECKED_STEPS)
        return [p.clone() for p in contender.parameters()]

    def contender(self, impl: str) -> Contender:
        """Raises ArithmeticError if its parameters are farther from the truth than twice the eager loop's allow."""
        if impl not in self.built:
            contender = IMPLS[impl].build(Problem(self.case, self.device))
            error = relative_error(self._after(contender), self.truth)
            if not error <= self.bound:  # a NaN must fail
                raise ArithmeticError(f"{impl} is off by {error:.2e}, more than {self.bound:.2e}")
            self.built[impl], self.errors[impl] = contender, error
        return self.built[impl]

    @cached_property
    def steps_per_call(self) -> dict[str, int]:
        counts = {}
        for impl in self.impls:
            contender, steps, took = self.contender(impl), 1, 0.0
            # From call to call, since what a call costs by itself makes the steps of short ones look slow. Of two
            # calls, because some compile for every number of steps.
            while took < CALL_SECONDS / 2:
                steps = round(steps * min(10, max(2, CALL_SECONDS / took))) if took else steps
                call = partial(contender.advance, steps)
                took = min(timing.batch(call, 1, self.device == "cuda") for _ in range(2))
            counts[impl] = max(1, round(steps * CALL_SECONDS / took))
        return counts

    @cached_property
    def seconds_per_net_step(self) -> dict[str, list[float]]:
        """One value per round."""
        counts = self.steps_per_call
        calls = {i: partial(self.contender(i).advance, counts[i]) for i in self.impls}
        samples = timing.interleaved(
            calls,
            seconds=0.5 if self.quick else 2.0 if self.device == "cuda" else 4.0,
            batch_seconds=CALL_SECONDS,
            rounds=(5, 201),
            cuda=self.device == "cuda",
        )
        scale = {i: counts[i] * self.contender(i).nets for i in self.impls}
        return {i: [seconds / scale[i] for seconds in sample.wall] for i, sample in samples.items()}


@pytest.fixture(scope="session")
def groups(request, in_time):
    device, quick = map(request.config.getoption, ("--suite-device", "--suite-quick"))
    selected: dict[str, list[str]] = {}
    for item in request.session.items:
        if isinstance(item, pytest.Function) and item.function is test_training:
            wanted = item.callspec.params
            selected.setdefault(wanted["case"].name, []).append(wanted["impl"])
    held: dict[str, Group] = {}

    def group(case: Case) -> Group:
        if case.name not in held:
            held.clear()  # they come one after the other
            torch.compiler.reset()
            in_time(case.name)
            held[case.name] = Group(case, selected[case.name], device, quick)
        return held[case.name]

    return group


def test_training(benchmark, groups, request, impl, case):
    smoke = request.config.getoption("benchmark_disable")
    if smoke and impl == "compiled" and case.name not in COMPILED_IN_SMOKE_RUN:
        pytest.skip("not compiled in a run without timings")
    group = groups(case)
    contender = group.contender(impl)
    benchmark.group = case.name
    benchmark.extra_info |= {
        "impl": impl,
        "label": IMPLS[impl].label,
        "case": case.name,
        "sizes": list(case.sizes),
        "samples": case.samples,
        "batch_size": case.batch_size,
        "members": case.members,
        "optimizer": case.optimizer,
        "device": group.device,
        "error": group.errors[impl],
        "first_call_seconds": contender.first_call(),
    }
    if smoke:
        benchmark.pedantic(contender.advance, (1,))
        return
    times = group.seconds_per_net_step
    low, middle, high = statistics.quantiles(times[impl], n=4)
    steps = group.steps_per_call[impl]
    benchmark.extra_info |= {
        "steps_per_call": steps,
        "nets": contender.nets,
        "rounds": len(times[impl]),
        "us_per_net_step": 1e6 * middle,
        "spread": (high - low) / middle,
    }
    for base in (BASELINE, "jax"):
        if base in times:
            ratios = [theirs / own for theirs, own in zip(times[base], times[impl], strict=True)]
            benchmark.extra_info[f"speedup_over_{base}"] = statistics.median(ratios)
    benchmark.pedantic(contender.advance, (steps,), rounds=5)
