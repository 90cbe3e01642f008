# SPDX-License-Identifier: Apache-2.0
"""Who is timed: the same layers by different means, each checked against fp64 before it may be timed."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from stack_cases import SUITES, Case
from torch import Tensor, nn

from perceptriton.kernels import allow_fp32_split, explain
from perceptriton.mlp import MLP, LinearSigmoid

# What a dtype's own rounding may add to twice torch's error, as a relative norm.
FLOOR = {"float32": 2e-6, "bfloat16": 2e-3}


@dataclass(frozen=True)
class Problem:
    """The tensors of one case."""

    case: Case
    training: bool
    x: Tensor
    parameters: tuple[Tensor, ...]  # weight and bias of each layer
    dy: Tensor

    @classmethod
    def make(cls, case: Case, dtype: str, mode: str, device: str) -> "Problem":
        """Pre-activations of std 1 to 2 and upstream gradients of order 1.

        The gradients of a default-initialized sigmoid net are so small that zeros pass most tolerances.
        """
        generator = torch.Generator(device).manual_seed(0)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=device).mul_(scale)
            return values.to(getattr(torch, dtype))

        x, dy = normal(case.rows, case.sizes[0]), normal(case.rows, case.sizes[-1])
        layers = [(normal(n, k, scale=1.4 / k**0.5), normal(n, scale=0.5)) for k, n in pairwise(case.sizes)]
        return cls(case, mode != "forward", x, tuple(tensor for layer in layers for tensor in layer), dy)

    def double(self) -> "Problem":
        parameters = tuple(parameter.double() for parameter in self.parameters)
        return Problem(self.case, self.training, self.x.double(), parameters, self.dy.double())

    def load(self, make: Callable[[], nn.Module]) -> nn.Module:
        """The model that `make` makes, with parameters of its own in the problem's memory."""
        # To initialize billions of numbers that nobody reads would take minutes.
        with torch.device("meta"):
            model = make()
        model.load_state_dict(dict(zip(model.state_dict(), self.parameters, strict=True)), assign=True)
        return model

    def names(self) -> list[str]:
        """What a contender is checked by: y, and when training every gradient."""
        layers = range(len(self.case.sizes) - 1)
        gradients = [f"{kind}{layer}" for layer in layers for kind in ("dweight", "dbias")]
        return ["y", *gradients, *(["dx"] if self.case.x_requires_grad else [])] if self.training else ["y"]


@dataclass
class Contender:
    """`step` does once what is timed. `results` does it once and returns what came out."""

    step: Callable[[], Tensor]
    results: Callable[[], dict[str, Tensor]]


def contend(problem: Problem, model: nn.Module, call: Callable[[Tensor], Tensor] | None = None) -> Contender:
    """call: what to call in place of the model whose parameters are differentiated."""
    call = model if call is None else call
    x = problem.x.detach()
    if not problem.training:
        # The caller turns gradients off, once and not at every call.
        return Contender(lambda: call(x), lambda: {"y": call(x)})
    x.requires_grad_(problem.case.x_requires_grad)
    dy = problem.dy
    leaves = [*model.parameters(), *([x] if x.requires_grad else [])]

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = call(x)
        y.backward(dy)
        return y

    def results() -> dict[str, Tensor]:
        y = step().detach()
        return dict(zip(problem.names(), [y, *(leaf.grad for leaf in leaves)], strict=True))

    return Contender(step, results)


def capture(step: Callable[[], object]) -> tuple[torch.cuda.CUDAGraph, object]:
    """A CUDA graph of one step, after three that warm up, and what the captured one returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = step()
    return graph, outcome


def in_cuda_graph(plain: Contender) -> Contender:
    """One replay of everything that a step of `plain` launches: forward, backward and the gradients' memory."""
    graph, outcome = capture(plain.results)

    def step() -> Tensor:
        graph.replay()
        return outcome["y"]

    def results() -> dict[str, Tensor]:
        for tensor in outcome.values():
            tensor.fill_(torch.nan)  # or the check would see what the capture's warm-up left there
        step()
        return outcome

    return Contender(step, results)


# --- the contenders ----------------------------------------------------------------------------------------


# What stands behind the last layer. No kernel of ours has these as its end: they are torch's for every contender.
TAILS: dict[str, Callable[[Tensor], Tensor]] = {
    "logsumexp": lambda z: torch.logsumexp(z, dim=1),
    "sum": lambda y: torch.sum(y, dim=1, keepdim=True),
    "residual": lambda z: torch.sigmoid(z) * 2.0 + z,
}
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "relu": nn.ReLU, "identity": nn.Identity}


class Tail(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.operations = TAILS[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.operations(x)


def eager_model(problem: Problem) -> nn.Module:
    case = problem.case
    names = [case.activation] * (len(case.sizes) - 2) + [case.output_activation]
    tail = [Tail(case.tail)] if case.tail else []

    def make() -> nn.Module:
        layers = [
            module
            for (k, n), name in zip(pairwise(case.sizes), names, strict=True)
            for module in (nn.Linear(k, n), *([] if name == "identity" else [ACTIVATIONS[name]()]))
        ]
        return nn.Sequential(*layers, *tail)

    return problem.load(make)


def fused_model(problem: Problem) -> nn.Module:
    case = problem.case

    def make() -> nn.Module:
        if len(case.sizes) == 2 and case.output_activation == "sigmoid":
            model: nn.Module = LinearSigmoid(*case.sizes)
        else:
            model = MLP(case.sizes, case.activation, case.output_activation)
        return nn.Sequential(model, Tail(case.tail)) if case.tail else model

    return problem.load(make)


def eager(problem: Problem) -> Contender:
    return contend(problem, eager_model(problem))


def fused(problem: Problem) -> Contender:
    return contend(problem, fused_model(problem))


def compiled(problem: Problem, mode: str = "default") -> Contender:
    model = eager_model(problem)
    # fullgraph: without it, whatever the compiler gives up on would be timed as eager code under its name.
    return contend(problem, model, torch.compile(model, fullgraph=True, dynamic=False, mode=mode))


@contextlib.contextmanager
def splitting(kind: str | None) -> Iterator[None]:
    before = allow_fp32_split(kind)
    try:
        yield
    finally:
        allow_fp32_split(before)


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def under(setting: Callable[[], contextlib.AbstractContextManager], plain: Contender) -> Contender:
    """The same, with the setting in force during its calls."""

    def step() -> Tensor:
        with setting():
            return plain.step()

    def results() -> dict[str, Tensor]:
        with setting():
            return plain.results()

    return Contender(step, results)


def split(problem: Problem, kind: str) -> Contender:
    """Raises NotImplementedError where a layer's plan would not compute its product so."""
    case, x = problem.case, problem.x
    with splitting(kind):
        plans = [explain((case.rows, k), (n, k), x.dtype, x.device).forward for k, n in pairwise(case.sizes)]
    for plan in plans:
        if plan.precision != kind:
            raise NotImplementedError(f"no {kind} here: {plan.reason}")
    return under(partial(splitting, kind), fused(problem))


@dataclass(frozen=True)
class Impl:
    label: str
    build: Callable[[Problem], Contender]
    devices: tuple[str, ...] = ("cpu", "cuda")
    suites: tuple[str, ...] = tuple(SUITES)
    bound: float | None = None  # how far it may be off, for products that are not to be as good as torch's
    reference: bool = False  # timed for comparison even where elements are beyond the case's tolerance
    split: str | None = None  # what `allow_fp32_split` allows it


def split_impl(kind: str, bound: float | None = None) -> Impl:
    # Never as fp32: the label says by what.
    label = f"perceptriton, tensor-core split {kind}"
    return Impl(label, partial(split, kind=kind), ("cuda",), ("mlp", "kernelbench"), bound, split=kind)


BASELINE, JUDGED = "eager", "fused"
STACKS = ("layers", "mlp")
IMPLS = {
    "eager": Impl("eager", eager),
    "fused": Impl("perceptriton", fused),
    "compiled": Impl("torch.compile", compiled),
    "autotuned": Impl("torch.compile max-autotune", partial(compiled, mode="max-autotune"), ("cuda",)),
    "eager_graph": Impl("eager in a CUDA graph", lambda p: in_cuda_graph(eager(p)), ("cuda",), STACKS),
    "fused_graph": Impl("perceptriton in a CUDA graph", lambda p: in_cuda_graph(fused(p)), ("cuda",), STACKS),
    # Bounds that no constant meets, and what products are off by does: by emulation, up to 4e-2 after 17 layers of TF32
    # and 7e-5 of bf16x3. What the latter has to keep is the tolerance.
    "eager_tf32": Impl("eager, TF32 allowed", lambda p: under(tf32, eager(p)), ("cuda",), ("kernelbench",), 0.2, True),
    "split_bf16x6": split_impl("bf16x6"),
    "split_bf16x3": split_impl("bf16x3", bound=1e-3),
}


# --- the check ---------------------------------------------------------------------------------------------


class Check:
    """fp64 truth for one problem, and how far torch's own result in the problem's dtype is from it.

    Errors are relative norms. A sum over thousands of sigmoids, or the logarithm of one, is nearly the same for every
    input: where a case has a tolerance of its own, which such a constant may meet, errors are relative to how much the
    truth varies from row to row.
    """

    def __init__(self, problem: Problem) -> None:
        self.floor = FLOOR[str(problem.x.dtype).removeprefix("torch.")]
        self.tolerance = problem.case.tolerance
        self.truth = eager(problem.double()).results()
        self.scale = {
            name: (truth if self.tolerance is None else truth - truth.mean(dim=0)).norm()
            for name, truth in self.truth.items()
        }
        self.torch_errors = self._errors(eager(problem).results())

    def _errors(self, results: dict[str, Tensor]) -> dict[str, float]:
        return {
            name: ((results[name].double() - truth).norm() / self.scale[name]).item()
            for name, truth in self.truth.items()
        }

    def __call__(self, contender: Contender, bound: float | None = None, reference: bool = False) -> dict[str, float]:
        """The contender's errors; of a case with a tolerance, the worst element's too, in tolerances.

        Raises ArithmeticError if an error exceeds twice torch's plus the dtype's floor, or `bound` if there is one; or,
        unless it is a reference, if an element is beyond the tolerance.
        """
        results = contender.results()
        for name, truth in self.truth.items():
            if results[name].shape != truth.shape:
                raise ArithmeticError(f"{name} is {tuple(results[name].shape)}, not {tuple(truth.shape)}")
        errors = self._errors(results)
        for name, error in errors.items():
            most = 2 * self.torch_errors[name] + self.floor if bound is None else bound
            if not error <= most:  # a NaN must fail
                raise ArithmeticError(
                    f"{name} is off by {error:.2e}, more than {most:.2e} (torch: {self.torch_errors[name]:.2e})"
                )
        if self.tolerance is not None:
            off, truth = (results["y"].double() - self.truth["y"]).abs(), self.truth["y"].abs()
            errors["worst"] = (off / (self.tolerance + self.tolerance * truth)).max().item()
            if not (errors["worst"] <= 1 or reference):
                raise ArithmeticError(
                    f"an element of y is off by {errors['worst']:.2g} times the tolerance of {self.tolerance:g}"
                )
        return errors
