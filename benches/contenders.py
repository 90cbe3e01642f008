"""Who is timed: the same layers by different means, each checked against fp64 before it may be timed."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from stack_cases import Case
from torch import Tensor, nn

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

    def load(self, model: nn.Module) -> nn.Module:
        """Gives the model the problem's parameters."""
        model = model.to(self.x.device, self.x.dtype)
        with torch.no_grad():
            for own, given in zip(model.parameters(), self.parameters, strict=True):
                own.copy_(given)
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


def in_cuda_graph(problem: Problem, plain: Contender) -> Contender:
    """One replay of everything that a step of `plain` launches: forward, backward and the gradients' memory."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            plain.step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outcome = plain.results()

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


def eager_model(problem: Problem) -> nn.Module:
    layers = [module for k, n in pairwise(problem.case.sizes) for module in (nn.Linear(k, n), nn.Sigmoid())]
    return problem.load(nn.Sequential(*layers))


def fused_model(problem: Problem) -> nn.Module:
    sizes = problem.case.sizes
    return problem.load(LinearSigmoid(*sizes) if len(sizes) == 2 else MLP(sizes))


def eager(problem: Problem) -> Contender:
    return contend(problem, eager_model(problem))


def fused(problem: Problem) -> Contender:
    return contend(problem, fused_model(problem))


def compiled(problem: Problem, mode: str = "default") -> Contender:
    model = eager_model(problem)
    # fullgraph: without it, whatever the compiler gives up on would be timed as eager code under its name.
    return contend(problem, model, torch.compile(model, fullgraph=True, dynamic=False, mode=mode))


def autotuned(problem: Problem) -> Contender:
    return compiled(problem, "max-autotune")


def eager_graph(problem: Problem) -> Contender:
    return in_cuda_graph(problem, eager(problem))


def fused_graph(problem: Problem) -> Contender:
    return in_cuda_graph(problem, fused(problem))


@dataclass(frozen=True)
class Impl:
    label: str
    build: Callable[[Problem], Contender]
    devices: tuple[str, ...] = ("cpu", "cuda")


BASELINE, JUDGED = "eager", "fused"
IMPLS = {
    "eager": Impl("eager", eager),
    "fused": Impl("perceptriton", fused),
    "compiled": Impl("torch.compile", compiled),
    "autotuned": Impl("torch.compile max-autotune", autotuned, ("cuda",)),
    "eager_graph": Impl("eager in a CUDA graph", eager_graph, ("cuda",)),
    "fused_graph": Impl("perceptriton in a CUDA graph", fused_graph, ("cuda",)),
}


# --- the check ---------------------------------------------------------------------------------------------


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """|actual - truth| / |truth| in fp64."""
    return ((actual.double() - truth).norm() / truth.norm()).item()


class Check:
    """fp64 truth for one problem, and how far torch's own result in the problem's dtype is from it."""

    def __init__(self, problem: Problem) -> None:
        self.floor = FLOOR[str(problem.x.dtype).removeprefix("torch.")]
        self.truth = eager(problem.double()).results()
        self.torch_errors = self._errors(eager(problem).results())

    def _errors(self, results: dict[str, Tensor]) -> dict[str, float]:
        return {name: relative_error(results[name], truth) for name, truth in self.truth.items()}

    def __call__(self, contender: Contender) -> dict[str, float]:
        """The contender's errors. Raises ArithmeticError if one exceeds twice torch's plus the dtype's floor."""
        results = contender.results()
        for name, truth in self.truth.items():
            if results[name].shape != truth.shape:
                raise ArithmeticError(f"{name} is {tuple(results[name].shape)}, not {tuple(truth.shape)}")
        errors = self._errors(results)
        for name, error in errors.items():
            bound = 2 * self.torch_errors[name] + self.floor
            if not error <= bound:  # a NaN must fail
                raise ArithmeticError(
                    f"{name} is off by {error:.2e}, more than {bound:.2e} (torch: {self.torch_errors[name]:.2e})"
                )
        return errors
