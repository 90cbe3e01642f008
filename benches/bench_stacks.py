# SPDX-License-Identifier: Apache-2.0
"""The suites "layers", "mlp", "kernelbench": every contender on every case, checked against fp64 before it is timed.

usage: pytest benches/bench_stacks.py [--suite NAME] [--benchmark-json=FILE] [-k EXPRESSION] [--suite-quick] ...
       pytest benches/bench_stacks.py --benchmark-disable       checks everything, times nothing

pytest-benchmark times each contender by itself. The figures to compare are in `extra_info`: those of one interleaved
measurement per case and mode, taken when the first contender of the group comes up, over all that are selected.

    interleaved_us          median time per call; on CUDA with one synchronize per batch of calls
    event_us                on CUDA, the same calls between two events
    speedup_over_eager      median over the rounds of the ratio within a round
    speedups_over_eager     the same for each run: there are three where the first was not clearly above 1
    interleaved_spread      interquartile range over median: beyond a few percent, the machine was busy
"""

from collections.abc import Callable
from functools import cached_property
from itertools import pairwise

import pytest
import timing
import torch
from contenders import BASELINE, IMPLS, JUDGED, Check, Contender, Problem, splitting
from stack_cases import Case, cases

from perceptriton.kernels import explain
from perceptriton.kernels.plan import mlp_bytes

# Compilers warn about settings that are not theirs to choose.
pytestmark = pytest.mark.filterwarnings("default")

# Compiling takes seconds per case and mode: where nothing is timed, these few are proof enough.
COMPILED_IN_SMOKE_RUN = ("launch-2", "classifier", "xor-deep")

# Time on a GPU is lent, and a run that is cut off leaves nothing: by default no case starts after this many seconds.
CUDA_SECONDS = 180.0


def pytest_generate_tests(metafunc):
    config = metafunc.config
    device = config.getoption("--suite-device")
    suite, dtypes = config.getoption("--suite"), config.getoption("--suite-dtypes")
    parameters = [
        pytest.param(impl, case, dtype, mode, id=f"{case.name}-{dtype}-{mode}-{impl}")
        for case, dtype in cases(suite, device, tuple(dtypes.split(",")) if dtypes else None)
        for mode in case.modes
        for impl, record in IMPLS.items()
        if device in record.devices
        and suite in record.suites
        and (impl != "autotuned" or config.getoption("--suite-autotune"))
    ]
    metafunc.parametrize(("impl", "case", "dtype", "mode"), parameters)


class Group:
    """The contenders of one case, dtype and mode."""

    def __init__(self, case: Case, dtype: str, mode: str, device: str, impls: list[str], quick: bool) -> None:
        self.key = case, dtype, mode
        self.impls, self.device = impls, device
        # A GPU drifts less than a shared CPU. Long calls get fewer rounds: eleven, or five.
        seconds = 0.3 if quick else 0.5 if device == "cuda" else 2.0
        self.pace = {"seconds": seconds, "rounds": (5, 51) if quick else (11, 501)}
        self.problem = Problem.make(case, dtype, mode, device)
        self.check = Check(self.problem)
        self.built: dict[str, tuple[Contender, dict[str, float]] | Exception] = {}

    def contender(self, impl: str) -> tuple[Contender, dict[str, float]]:
        """The contender and its errors. Raises what building or checking it raised, each time it is asked for."""
        if impl not in self.built:
            try:
                record = IMPLS[impl]
                contender = record.build(self.problem)
                self.built[impl] = contender, self.check(contender, record.bound, record.reference)
            except Exception as error:  # it fails its own test, and must not stop the others from being compared
                self.built[impl] = error
        found = self.built[impl]
        if isinstance(found, Exception):
            raise found
        return found

    @cached_property
    def comparison(self) -> timing.Comparison:
        steps = {}
        for impl in self.impls:
            try:
                steps[impl] = self.contender(impl)[0].step
            except Exception:
                continue
        return timing.compare(steps, BASELINE, JUDGED, **self.pace, cuda=self.device == "cuda")


class Suite:
    """Holds one group at a time: groups are large, and come one after the other."""

    def __init__(self, session: pytest.Session, in_time: Callable[..., None]) -> None:
        config = session.config
        self.device = config.getoption("--suite-device")
        self.quick = config.getoption("--suite-quick")
        self.smoke = config.getoption("benchmark_disable")
        self.group: Group | None = None
        self.in_time, self.seconds = in_time, CUDA_SECONDS if self.device == "cuda" and not self.smoke else None
        self.impls: dict[tuple, list[str]] = {}
        for item in session.items:
            if isinstance(item, pytest.Function) and hasattr(item, "callspec") and "impl" in item.callspec.params:
                wanted = item.callspec.params
                self.impls.setdefault((wanted["case"], wanted["dtype"], wanted["mode"]), []).append(wanted["impl"])

    def enter(self, case: Case, dtype: str, mode: str) -> Group:
        key = case, dtype, mode
        if self.group is not None and self.group.key == key:
            return self.group
        self.group = None
        self.in_time(f"{case.name} {dtype} {mode}", self.seconds)
        # All models share the code of nn.Sequential.forward, and the compiler keeps only so many versions of one code.
        torch.compiler.reset()
        self.group = Group(case, dtype, mode, self.device, self.impls[key], self.quick)
        return self.group


@pytest.fixture(scope="session")
def suite(request, limits, in_time):
    return Suite(request.session, in_time)


def planned(case: Case, mode: str, x: torch.Tensor, split: str | None = None) -> dict:
    """What runs and why; for networks of kernels, also the bytes that it moves by `plan.mlp_bytes`; on a GPU, what a
    model of the chip, or of an H200, predicts."""
    shapes = [(n, k) for k, n in pairwise(case.sizes)]
    with splitting(split):
        plans = explain(x.shape, shapes if len(shapes) > 1 else shapes[0], x.dtype, x.device)
        layers = [explain((case.rows, k), (n, k), x.dtype, x.device) for n, k in shapes]
    found = plans[:1] if mode == "forward" else plans[-2:]
    reasons = [plan.reason for plan in found]
    if found[0].impl in ("layers", "stack"):
        reasons += [plan.reason for layer in layers for plan in layer[: len(found)]]
    info: dict = {"plan": "; ".join(dict.fromkeys(reasons))}
    if found[0].impl == "fused":
        info["plan_bytes"] = mlp_bytes(case.rows, case.sizes, x.element_size(), *found)
    predictions = [plan.prediction for plan in found if plan.prediction]
    if predictions:
        info["predicted_chip"] = predictions[0].chip
        info["predicted_us"] = sum(prediction.plan_us for prediction in predictions)
        info["predicted_limit_us"] = sum(prediction.limit_us for prediction in predictions)
    return info


def test_stack(benchmark, suite, missed, impl, case, dtype, mode):
    if suite.smoke and impl in ("compiled", "autotuned") and case.name not in COMPILED_IN_SMOKE_RUN:
        pytest.skip("not compiled in a run without timings")
    with torch.set_grad_enabled(mode != "forward"):
        group = suite.enter(case, dtype, mode)
        try:
            contender, errors = group.contender(impl)
        except ArithmeticError as error:
            if impl.startswith(JUDGED) or impl == BASELINE:
                raise
            missed.append(f"{case.name} {dtype} {mode}, {IMPLS[impl].label}: {error}")
            pytest.skip(f"not timed, since it misses the truth: {error}")  # neither judged nor the baseline
        except NotImplementedError as error:
            if not IMPLS[impl].split:
                raise
            pytest.skip(str(error))
        cuda = suite.device == "cuda"
        benchmark.group = f"{case.name} {dtype} {mode}"
        benchmark.extra_info |= {
            "impl": impl,
            "label": IMPLS[impl].label,
            "case": case.name,
            "shape": [case.rows, *case.sizes],
            "dtype": dtype,
            "device": suite.device,
            "mode": mode,
            "flops": case.flops(mode),
            "bytes": case.bytes(mode, dtype),
            "errors": errors,
        }
        if impl.startswith(JUDGED) or IMPLS[impl].split:
            benchmark.extra_info |= planned(case, mode, group.problem.x, IMPLS[impl].split)

        def target():
            contender.step()
            if cuda:
                torch.cuda.synchronize()

        if suite.smoke:
            benchmark.pedantic(target)
            return
        comparison = group.comparison
        samples = comparison.samples[impl]
        benchmark.extra_info |= {
            "interleaved_us": 1e6 * samples.seconds,
            "interleaved_rounds": len(samples.wall),
            "interleaved_spread": samples.spread,
            "event_us": 1e6 * samples.event_seconds if samples.event_seconds is not None else None,
        }
        if impl in comparison.speedup:
            benchmark.extra_info["speedup_over_eager"] = comparison.speedup[impl]
            benchmark.extra_info["speedups_over_eager"] = comparison.all_speedups[impl]
        iterations = 1 if cuda else timing.calls_per_batch(contender.step, 1e-3)
        rounds = max(5, min(100, round(0.2 / (iterations * samples.seconds))))
        benchmark.pedantic(target, rounds=rounds, iterations=iterations, warmup_rounds=1)
