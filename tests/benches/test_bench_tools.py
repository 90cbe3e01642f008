# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' own tools: formulas, timer, check before timing, fit of thresholds, report, driver.

Modules of benches/ are imported by name at run time only: the two folders know nothing of each other.
"""

import argparse
import dataclasses
import functools
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

from perceptriton import kernels
from perceptriton.kernels import tables

BENCHES = Path(__file__).parents[2] / "benches"


@pytest.fixture
def bench(monkeypatch):
    """bench(name): that module of benches/."""
    monkeypatch.syspath_prepend(BENCHES)
    return importlib.import_module


def in_benches(code, *arguments, **options):
    """A python process that finds the modules of benches/ first."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=BENCHES, text=True, **options)


# --- flops and bytes, by hand ------------------------------------------------------------------------------

# 65,536 x 64 is 4,194,304 elements, 64 x 64 4,096. Forward moves x, weight, bias, y: 8,392,768 elements. Backward
# moves dy, y, x, weight, dx, dweight, dbias: 16,785,472 elements.
# The classifier multiplies 128 x 784 x 128 and 128 x 128 x 10 (12,845,056 and 163,840 multiply-adds) forward, both
# for the weights' gradients and the second for dx. It has 101,770 parameters, 100,352 inputs and 1,280 outputs.
BY_HAND = {
    ("narrow-64", "forward"): (536_870_912, 4 * 8_392_768),
    ("narrow-64", "forward+backward"): (3 * 536_870_912, 4 * (8_392_768 + 16_785_472)),
    ("launch-2", "forward"): (32, 4 * (8 + 4 + 2 + 8)),
    ("launch-2", "forward+backward"): (96, 4 * (22 + 8 + 8 + 8 + 4 + 8 + 4 + 2)),
    ("classifier", "forward"): (26_017_792, 4 * (100_352 + 101_770 + 1_280)),
    ("classifier", "forward+backward"): (2 * 26_017_792 + 327_680, 4 * (203_402 + 203_402 + 101_770)),
}


@pytest.mark.parametrize(("name", "mode"), BY_HAND)
def test_formulas(bench, name, mode):
    case = next(case for case in bench("stack_cases").LAYERS if case.name == name)
    assert (case.flops(mode), case.bytes(mode, "float32")) == BY_HAND[name, mode]
    assert case.bytes(mode, "bfloat16") * 2 == case.bytes(mode, "float32")


def test_cases_of_a_device(bench):
    cases = bench("stack_cases").cases
    on_cpu, on_cuda = cases("layers", "cpu"), cases("layers", "cuda")
    assert {dtype for _, dtype in on_cpu} == {"float32"}
    assert {dtype for _, dtype in on_cuda} == {"float32", "bfloat16"}
    assert {case.name for case, _ in on_cuda} - {case.name for case, _ in on_cpu} == {"narrow-64-long", "wide-8192"}
    assert len({case.name for case, _ in on_cuda}) == len(on_cuda) / 2


def test_networks_climb_a_ladder_of_rows(bench):
    cases = bench("stack_cases").cases
    ladders = {}
    for case, _ in cases("mlp", "cuda", ("bfloat16",)):
        ladders.setdefault(case.sizes, []).append(case.rows)
    powers = [1 << power for power in (10, 12, 14, 16, 18, 20, 21)]
    for sizes in ((64,) * 4, (64,) * 6, (64,) * 10, (128,) * 6, (31, 64, 64, 2), (36, 64, 9, 1)):
        assert sorted(ladders[sizes]) == powers
    # on a CPU nothing that takes minutes
    assert max(case.rows for case, _ in cases("mlp", "cpu")) == 1 << 16
    # On a GPU a run may end before the last of them: what has a target comes first, and nothing is left out.
    module = bench("stack_cases")
    on_cuda = [case.name for case, _ in cases("mlp", "cuda", ("bfloat16",))]
    assert on_cuda[:2] == list(module.FIRST[:2])
    assert sorted(on_cuda) == sorted(case.name for case in module.NETWORKS if "cuda" in case.devices)
    every = {case.name for suite in module.SUITES.values() for case in suite}
    assert every >= set(module.FIRST)
    training = bench("bench_training")
    assert {case.name for case in training.CASES} >= set(training.FIRST)


def test_ways_of_fit_are_obeyed(bench):
    training = bench("bench_training")
    ways = {name: impl for name, impl in training.IMPLS.items() if name.startswith("fit-")}
    taken = {case.name for case in training.CASES for impl in ways.values() if impl.takes(case)}
    assert taken == {"forum", "batch-1024", "batch-4096", "batch-16384", "batch-65536"}
    (forum,) = (case for case in training.CASES if case.name == "forum")
    for name, impl in ways.items():
        assert impl.devices == ("cuda",)
        with pytest.raises(NotImplementedError, match=f"impl='{name.removeprefix('fit-')}'"):
            impl.build(training.Problem(forum, "cpu")).advance(1)


# Operations, and elements moved: x, weights, biases, y. A row that ends in a sum or in its log-sum-exp is one element.
KERNELBENCH = {
    "L2-45-gemm-sigmoid-logsumexp": (412_316_860_416, 33_554_432 + 12_582_912 + 5_120 + 16_384),
    "L2-56-matmul-sigmoid-sum": (274_877_906_944, 4_194_304 + 1_073_741_824 + 32_768 + 128),
    "L2-70-gemm-sigmoid-residual": (137_438_953_472, 8_388_608 + 67_108_864 + 8_192 + 8_388_608),
    "L3-3-deep-narrow-mlp": (66_571_993_088, 8_388_608 + 32_505_856 + 24_576 + 8_388_608),
    "L3-1-mlp": (171_798_691_840, 2_097_152 + 671_088_640 + 40_960 + 1_048_576),
    "L3-2-shallow-wide-mlp": (549_755_813_888, 2_097_152 + 2_147_483_648 + 81_920 + 2_097_152),
}


def test_kernelbench_problems(bench):
    cases = bench("stack_cases").cases
    published = {case.name: case for case, _ in cases("kernelbench", "cuda")}
    found = {name: (case.flops("forward"), case.bytes("forward", "float32") // 4) for name, case in published.items()}
    assert found == KERNELBENCH
    assert cases("kernelbench", "cuda", ("bfloat16",)) == [], "its tolerance is that of fp32"
    for case, dtype in cases("kernelbench", "cpu"):
        whole = published[case.name.removesuffix("-eighth")]
        assert (case.rows, [8 * size for size in case.sizes]) == (whole.rows, [*whole.sizes])
        assert (dtype, case.tail, case.modes) == ("float32", whole.tail, ("forward",))


# On an H200, in milliseconds: on the FMA units, and as six products of bf16, by hand from its peak rates.
LIMITS = dict(
    zip(KERNELBENCH, [(6.16, 2.50), (4.11, 1.67), (2.05, 0.83), (1.00, 0.40), (2.57, 1.04), (8.22, 3.33)], strict=True)
)


def test_predictions_of_kernelbench_problems(bench, monkeypatch):
    stacks = bench("bench_stacks")
    h200 = kernels.Device("cuda", 90, 132, triton=True)
    monkeypatch.setattr(stacks, "explain", lambda x, weights, dtype, _: kernels.explain(x, weights, dtype, h200))
    for case, _ in bench("stack_cases").cases("kernelbench", "cuda"):
        x = torch.empty(case.rows, case.sizes[0], device="meta")
        fp32, split = (stacks.planned(case, "forward", x, kind) for kind in (None, "bf16x6"))
        for info, limit in zip((fp32, split), LIMITS[case.name], strict=True):
            assert info["predicted_chip"] == "H200"
            assert info["predicted_limit_us"] == pytest.approx(1e3 * limit, rel=0.01)
            assert info["predicted_limit_us"] < info["predicted_us"] < 1.15 * info["predicted_limit_us"]
        # Every layer takes the split: else `contenders.split` would refuse, and nothing would be timed under its name.
        assert "bound by arithmetic" in fp32["plan"]
        assert "bound by arithmetic" not in split["plan"]
        assert "TMA" in split["plan"]


# --- the timer ---------------------------------------------------------------------------------------------


def test_the_timer_is_honest(bench, monkeypatch):
    # On a simulated clock, which no other process on this machine can hold up: only the steps let time go by.
    timing, now, log = bench("timing"), [0.0], []
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))

    def of_duration(seconds):
        def step():
            now[0] += seconds
            log.append(seconds)

        return step

    steps = {"long": of_duration(0.002), "short": of_duration(0.0002)}
    samples = timing.interleaved(steps, seconds=0.1, rounds=(21, 91))
    assert samples["long"].wall == pytest.approx([0.002] * len(samples["long"].wall))
    assert samples["short"].wall == pytest.approx([0.0002] * len(samples["short"].wall))
    # A round is one long step, and a millisecond of short ones with an untimed one before.
    assert len(samples["long"].wall) == len(samples["short"].wall) == 32
    assert log[-7 * 30 :].count(0.0002) == 6 * 30


def test_rounds_take_turns(bench):
    order = []
    # The clock's resolution would let a step of no length fill a batch with a million calls.
    steps = {name: lambda name=name: (order.append(name), time.sleep(0.001)) for name in "abc"}
    bench("timing").interleaved(steps, seconds=0, batch_seconds=1e-4, rounds=(10, 10))
    rounds = ["".join(order[-30:][i : i + 3]) for i in range(0, 30, 3)]
    assert {"".join(sorted(r)) for r in rounds} == {"abc"}
    assert len(set(rounds)) > 1, "always in the same order"


def test_speedup_is_taken_within_rounds(bench):
    timing = bench("timing")
    # A machine that halves its speed for some rounds: medians over all rounds would say 3 / 2, and 1.5 / 1.
    slow = timing.Samples([2.0, 2.0, 4.0, 4.0, 4.0])
    fast = timing.Samples([1.0, 1.0, 2.0, 2.0, 2.0])
    assert timing.speedup(slow, fast) == 2
    noisy = timing.Samples([1.0, 1.0, 2.0, 2.0, 20.0])
    assert timing.speedup(slow, noisy) == 2


@pytest.mark.parametrize(
    ("ratios", "kept"),
    [((1.5, 9, 9), 1.5), ((0.9, 1.2, 1.0), 1.0), ((1.02, 0.8, 0.7), 0.8)],
    ids=["faster-once", "slower-thrice", "nearly-thrice"],
)
def test_rows_below_one_are_timed_three_times(bench, monkeypatch, ratios, kept):
    timing = bench("timing")
    runs = iter([{"eager": timing.Samples([1.0]), "fused": timing.Samples([1 / ratio])} for ratio in ratios])
    monkeypatch.setattr(timing, "interleaved", lambda steps, **options: next(runs))
    comparison = timing.compare({"eager": None, "fused": None}, "eager", "fused")
    assert comparison.speedup["fused"] == pytest.approx(kept)
    assert comparison.samples["fused"].seconds == pytest.approx(1 / kept)
    tried = 1 if ratios[0] > timing.RETIME_BELOW else 3
    assert comparison.all_speedups["fused"] == pytest.approx(list(ratios[:tried]))
    assert len(comparison.all_speedups["eager"]) == tried


def test_threads_are_bound_before_torch():
    code = """
import os, sys
for name in ("OMP_PROC_BIND", "OMP_NUM_THREADS"):
    os.environ.pop(name, None)
if sys.argv[1] == "torch":
    sys.modules["torch"] = None
import binding
print(binding.LATE is None, os.environ.get("OMP_PROC_BIND"), os.environ.get("OMP_NUM_THREADS", "0") > "0")
"""
    for first, said in (("nothing", "True true True"), ("torch", "False None False")):
        process = in_benches(code, first, stdout=subprocess.PIPE)
        assert process.communicate(timeout=60)[0].split() == said.split()


# --- the check before timing -------------------------------------------------------------------------------


MODES = ("forward", "forward+backward")


def make_problem(bench, mode):
    case = bench("stack_cases").Case("test", 33, (20, 20))
    return bench("contenders").Problem.make(case, "float32", mode, "cpu")


@pytest.mark.parametrize("mode", MODES)
def test_the_check_lets_the_contenders_pass(bench, mode):
    contenders, problem = bench("contenders"), make_problem(bench, mode)
    check = contenders.Check(problem)
    with torch.set_grad_enabled(problem.training):
        for name in ("eager", "fused"):
            errors = check(contenders.IMPLS[name].build(problem))
            assert set(errors) == ({"y", "dx", "dweight0", "dbias0"} if problem.training else {"y"})
            assert max(errors.values()) < 1e-5


def test_the_check_sees_every_gradient_of_a_network(bench):
    contenders = bench("contenders")
    case = bench("stack_cases").Case("network", 9, (6, 5, 4))
    problem = contenders.Problem.make(case, "float32", "forward+backward", "cpu")
    errors = contenders.Check(problem)(contenders.IMPLS["fused"].build(problem))
    assert set(errors) == {"y", "dweight0", "dbias0", "dweight1", "dbias1"}


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, dy):
        return (1 + 1e-4) * dy


WRONG = {
    "zeros": lambda model, x: 0 * model(x),
    "constant": lambda model, x: 0 * model(x) + 0.5,
    "nan": lambda model, x: torch.nan * model(x),
    "transposed": lambda model, x: torch.sigmoid(x @ model[0].weight + model[0].bias),
    "no-bias": lambda model, x: torch.sigmoid(x @ model[0].weight.t()) + 0 * model[0].bias,
    "off-by-1e-4": lambda model, x: (1 + 1e-4) * model(x),
    "gradient-off-by-1e-4": lambda model, x: ScaledGradient.apply(model(x)),
}


@pytest.mark.parametrize(
    ("mode", "name"), [(m, w) for m in MODES for w in WRONG if not (w.startswith("gradient") and m == "forward")]
)
def test_the_check_rejects(bench, mode, name):
    contenders, problem = bench("contenders"), make_problem(bench, mode)
    with torch.set_grad_enabled(problem.training):
        model = contenders.eager_model(problem)
        wrong = contenders.contend(problem, model, functools.partial(WRONG[name], model))
        with pytest.raises(ArithmeticError, match="is off by"):
            contenders.Check(problem)(wrong)


def test_the_check_rejects_another_shape(bench):
    contenders, problem = bench("contenders"), make_problem(bench, "forward")
    model = contenders.eager_model(problem)
    with torch.no_grad(), pytest.raises(ArithmeticError, match=r"y is \(32, 20\), not \(33, 20\)"):
        contenders.Check(problem)(contenders.contend(problem, model, lambda x: model(x)[:-1]))


def kernelbench_problem(bench, name):
    """A problem of KernelBench, thin enough to be computed at once: 48 rows, widths of 16 to 64."""
    case = next(case for case, _ in bench("stack_cases").cases("kernelbench", "cuda") if case.name == name)
    sizes = tuple(max(size // 512, 16) for size in case.sizes)
    return bench("contenders").Problem.make(
        dataclasses.replace(case, rows=48, sizes=sizes), "float32", "forward", "cpu"
    )


def perceptron(x, *parameters):
    for weight, bias in zip(parameters[:-2:2], parameters[1:-2:2], strict=True):
        x = (x @ weight.t() + bias).clamp(min=0)
    return x @ parameters[-2].t() + parameters[-1]


DEFINITIONS = {
    "L2-45-gemm-sigmoid-logsumexp": lambda x, v, a, w, b: (
        (1 / (1 + (-(x @ v.t() + a)).exp()) @ w.t() + b).exp().sum(1).log()
    ),
    "L2-56-matmul-sigmoid-sum": lambda x, w, b: (1 / (1 + (-(x @ w.t() + b)).exp())).sum(1)[:, None],
    "L2-70-gemm-sigmoid-residual": lambda x, w, b: x @ w.t() + b + 2 / (1 + (-(x @ w.t() + b)).exp()),
    "L3-3-deep-narrow-mlp": perceptron,
    "L3-1-mlp": perceptron,
    "L3-2-shallow-wide-mlp": perceptron,
}


@pytest.mark.parametrize("name", DEFINITIONS)
def test_kernelbench_modules_are_what_they_are_called(bench, name):
    contenders, problem = bench("contenders"), kernelbench_problem(bench, name)
    double = problem.double()
    truth = DEFINITIONS[name](double.x, *double.parameters)
    with torch.no_grad():
        torch.testing.assert_close(contenders.Check(problem).truth["y"], truth, rtol=1e-12, atol=1e-12)
        for impl in ("eager", "fused"):
            contender = contenders.IMPLS[impl].build(problem)
            torch.testing.assert_close(contender.results()["y"].double(), truth, rtol=1e-5, atol=1e-5)
        # Neither lost in saturation nor too small to be seen.
        spread = []
        model = contenders.eager_model(problem)
        for layer in model:
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(lambda layer, x, z: spread.append(z.std().item()))
        model(problem.x)
        assert len(spread) == len(problem.case.sizes) - 1
        assert all(0.6 < std < 2.5 for std in spread)


UNTRUE = {
    "zeros": torch.zeros_like,
    # of all that does not look at x, what comes closest
    "constant": lambda y: y.mean(0, keepdim=True).expand_as(y),
    "nan": lambda y: torch.nan * y,
}


@pytest.mark.parametrize("wrong", UNTRUE)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_kernelbench_answers_must_depend_on_the_input(bench, name, wrong):
    contenders, problem = bench("contenders"), kernelbench_problem(bench, name)
    with torch.no_grad():
        check = contenders.Check(problem)
        y = UNTRUE[wrong](contenders.eager(problem).results()["y"])
        contender = contenders.Contender(lambda: y, lambda: {"y": y})
        # Even of products that are not held to fp32's errors.
        for record in (contenders.IMPLS[impl] for impl in ("fused", "split_bf16x3", "eager_tf32")):
            with pytest.raises(ArithmeticError, match="y is off by"):
                check(contender, record.bound, record.reference)
        if wrong != "nan":
            with pytest.raises(ArithmeticError, match="an element of y is off by"):
                check(contender, bound=math.inf)


def test_a_constant_near_every_answer_is_far_from_the_truth(bench):
    # The sum of 4,096 sigmoids, as it is timed on a CPU: within one percent of a constant, as a norm.
    contenders = bench("contenders")
    (case,) = [case for case, _ in bench("stack_cases").cases("kernelbench", "cpu") if case.tail == "sum"]
    problem = contenders.Problem.make(dataclasses.replace(case, rows=48), "float32", "forward", "cpu")
    with torch.no_grad():
        check = contenders.Check(problem)
        y = check.truth["y"].mean().expand(48, 1).float()
        assert (y - check.truth["y"]).norm() < 1e-2 * y.norm()
        with pytest.raises(ArithmeticError, match=r"y is off by 1\.00e\+00, more than 2\.00e-01"):
            check(
                contenders.Contender(lambda: y, lambda: {"y": y}), contenders.IMPLS["eager_tf32"].bound, reference=True
            )


def test_products_are_held_to_what_they_claim(bench):
    contenders, problem = bench("contenders"), kernelbench_problem(bench, "L3-1-mlp")
    with torch.no_grad():
        check = contenders.Check(problem)
        y = contenders.eager(problem).results()["y"]

        def off_by(error):
            wrong = y * (1 + error)
            return contenders.Contender(lambda: wrong, lambda: {"y": wrong})

        fp32, x6, x3, tf32 = (contenders.IMPLS[i] for i in ("fused", "split_bf16x6", "split_bf16x3", "eager_tf32"))
        for record in (fp32, x6):
            with pytest.raises(ArithmeticError, match="y is off by"):
                check(off_by(2e-5), record.bound, record.reference)
        assert check(off_by(2e-5), x3.bound, x3.reference)["worst"] < 1
        # TF32 is there to be compared with: its elements are beyond 1e-4, and the report says so.
        for record in (fp32, x6, x3):
            with pytest.raises(ArithmeticError, match="off by"):
                check(off_by(3e-3), record.bound, record.reference)
        assert check(off_by(3e-3), tf32.bound, tf32.reference)["worst"] > 1
        with pytest.raises(ArithmeticError, match="y is off by"):
            check(off_by(0.5), tf32.bound, tf32.reference)


def test_settings_are_in_force_during_calls_only(bench):
    contenders, problem = bench("contenders"), kernelbench_problem(bench, "L2-70-gemm-sigmoid-residual")
    matmul = torch.backends.cuda.matmul
    outside, seen = matmul.fp32_precision, []
    plain = contenders.Contender(lambda: seen.append(matmul.fp32_precision), lambda: seen.append(matmul.fp32_precision))
    wrapped = contenders.under(contenders.tf32, plain)
    wrapped.step()
    wrapped.results()
    assert seen == ["tf32", "tf32"]
    assert matmul.fp32_precision == outside != "tf32"
    # No split where a layer's plan would not take it: a CPU has none.
    with pytest.raises(NotImplementedError, match="no bf16x6 here"):
        contenders.IMPLS["split_bf16x6"].build(problem)
    assert kernels.allow_fp32_split(None) is None


def test_contenders_share_memory_but_no_gradients(bench):
    contenders, problem = bench("contenders"), make_problem(bench, "forward+backward")
    models = [contenders.eager_model(problem), contenders.fused_model(problem)]
    models[0](problem.x).sum().backward()
    for given, *own in zip(problem.parameters, *(model.parameters() for model in models), strict=True):
        assert {p.data_ptr() for p in own} == {given.data_ptr()}
        assert own[0].grad is not None
        assert own[1].grad is None
        assert given.grad is None


# --- thresholds for the CPU --------------------------------------------------------------------------------

SHAPES = [(m, k, n) for m in (64, 256, 1024, 4096, 65_536) for k in (1, 8, 16, 64, 256) for n in (1, 8, 16, 64, 256)]
SHAPES += [(300, 64, 64), (16 * 64, 64, 256), (16 * 64 + 1, 64, 256)]


def rows_of(tune, takes_second, role="forward", gain=1.5):
    """Rows in which the second side is `gain` times faster where it should be taken, and slower elsewhere."""
    return [tune.Row(role, m, k, n, 100.0, 100 / gain if takes_second(m, k, n) else 100 * gain) for m, k, n in SHAPES]


@pytest.mark.parametrize(
    "rule",
    [
        {"min_macs": 1 << 20, "min_width": 8, "min_in": 8},
        {"min_macs": 1 << 23, "min_width": 64, "min_in": 64},
        {"min_macs": 1 << 16, "min_width": 2, "min_in": 128},
        {"min_macs": 1 << 20, "min_width": 8, "min_in": 8, "max_width": 16},
        {"min_macs": 1 << 20, "min_width": 8, "min_in": 8, "max_in": 64},
    ],
    ids=str,
)
def test_fit_recovers_a_rule(bench, rule):
    tune = bench("tuning.cpu")

    def takes_onednn(m, k, n):
        if min(k, n) > rule.get("max_width", 256) or k > rule.get("max_in", 256):
            return False
        return m * k * n >= rule["min_macs"] and min(k, n) >= rule["min_width"] and k >= rule["min_in"]

    rows = rows_of(tune, takes_onednn)
    assert 0 < sum(takes_onednn(*shape) for shape in SHAPES) < len(SHAPES)
    found = tune.fit_rule(rows)
    # `tune.takes` asks plan/cpu.py, which has to read the rule in the same way.
    assert [row[1:4] for row in rows if tune.takes(found)(row)] == [s for s in SHAPES if takes_onednn(*s)]
    # Reluctant, never beyond the rule: where no row tells, mm stays.
    assert found["min_width"] >= rule["min_width"]
    assert found["min_macs"] >= rule["min_macs"]
    assert found["min_in"] >= rule["min_in"]


def test_fit_leaves_alone_what_always_loses(bench):
    tune = bench("tuning.cpu")
    assert tune.fit_rule(rows_of(tune, lambda *_: False)) is None
    assert tune.fit_small(rows_of(tune, lambda *_: False)) == tune.NEVER
    assert tune.fit_chunks(rows_of(tune, lambda *_: False, role="chunk_1048576"), 4)[0] == tune.NEVER


def test_fit_counts_losses_double(bench):
    tune = bench("tuning.cpu")
    # No rule tells these two shapes apart. Three gains of 2 % outweigh one loss of 4 %, but not twice that loss.
    gain, loss = tune.Row("dx", 64, 64, 64, 1.02, 1.0), tune.Row("dx", 64, 64, 65, 1.0, 1.04)
    assert tune.fit_rule([gain, gain, gain, loss]) is None
    assert tune.fit_rule([gain] * 5 + [loss]) is not None


def test_fit_of_small_and_chunks(bench):
    tune = bench("tuning.cpu")
    limit = 1 << 22
    small = tune.fit_small(rows_of(tune, lambda m, k, n: m * k * n >= limit, role="small_both"))
    assert all((math.prod(shape) >= small) == (math.prod(shape) >= limit) for shape in SHAPES)

    # Each of 4 threads has to get 256 rows, and a single input always loses.
    split = tune.fit_split(rows_of(tune, lambda m, k, n: m >= 1024 and k >= 8, role="split"), 4)
    assert split == {"rows": 256, "min_in": 8}
    assert tune.fit_split(rows_of(tune, lambda *_: False, role="split"), 4) is None
    split = tune.fit_split(rows_of(tune, lambda m, k, n: m >= 1024 and k >= 8 and k * n <= 512, role="split"), 4)
    assert split == {"rows": 256, "min_in": 8, "max_outputs": 512}

    # Pieces of 1 MB gain 1.5 above 8 MB and lose below; pieces of 256 KB gain less.
    def large(m, k, n):
        return 4 * m * n > 8 << 20

    rows = rows_of(tune, large, "chunk_1048576") + rows_of(tune, large, "chunk_262144", gain=1.2)
    above, size = tune.fit_chunks(rows, 4)
    assert size == 1 << 20
    assert all((4 * m * n > above) == large(m, k, n) for m, k, n in SHAPES)


def test_thresholds_are_in_force_only_inside(bench):
    tune = bench("tuning.cpu")
    rule = {"min_macs": 1, "min_width": 1, "min_in": 1}
    thresholds = {"small": 0, "forward": rule, "dx": None, "dweight": rule, "chunk_above_bytes": 0, "chunk_bytes": 1}
    before = kernels.explain((4096, 8), (8, 8))
    with tune.in_force(thresholds):
        forward, backward = kernels.explain((4096, 8), (8, 8))
    assert (forward.impl, forward.forward_gemm) == ("explicit", "onednn")
    assert (backward.dx_gemm, backward.dweight_gemm, backward.chunk) == ("mm", "onednn", 2048)
    assert kernels.explain((4096, 8), (8, 8)) == before


def test_both_sides_of_each_comparison_agree(bench, monkeypatch):
    tune = bench("tuning.cpu")
    shape = (40, 24, 16)
    tensors = tune.Tensors(*shape, torch.float32)
    gradients = {"forward": None, "dx": 0, "dweight": 1}
    for role, index in gradients.items():
        mm, onednn = (step() for step in tune.product_steps(role, tensors).values())
        torch.testing.assert_close(*(side if index is None else side[index] for side in (mm, onednn)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    product, split = (step()[1] for step in tune.split_steps("mm", tensors).values())
    torch.testing.assert_close(product, split)
    assert not torch.equal(product, split), "the same sums were taken twice"
    thresholds = {"small": 0, **dict.fromkeys(tune.ROLES), "chunk_above_bytes": tune.NEVER, "chunk_bytes": 1 << 20}
    tall = (5000, 8, 8)
    sides = tune.chunk_steps(*tall, "float32", thresholds, tune.Tensors(*tall, torch.float32))
    assert "whole" in sides
    assert len(sides) == 1, "a piece would hold all rows"
    wide = (5000, 8, 128)
    sides = tune.chunk_steps(*wide, "float32", thresholds, tune.Tensors(*wide, torch.float32))
    assert len(sides) > 2
    whole, *chunked = (step() for step in sides.values())
    for gradients in chunked:
        for one, other in zip(whole, gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_table_keeps_other_vendors(bench):
    tune = bench("tuning.cpu")
    document = {
        "thresholds": {"any": {"float32": {"small": 1}}, "AMD": {"float32": {"small": 2}, "float16": {"small": 3}}},
        "measured": {"Intel": {"threads": 4}, "AMD": {"threads": 1}},
    }
    merged = tune.merge(document, "AMD", {"float32": {"small": 9}}, {"threads": 2})
    assert merged["thresholds"]["any"] == {"float32": {"small": 1}}
    assert merged["thresholds"]["AMD"] == {"float32": {"small": 9}, "float16": {"small": 3}}
    assert merged["measured"] == {"Intel": {"threads": 4}, "AMD": {"threads": 2}}


def test_table_holds_a_row_per_line(bench):
    common = bench("tuning.common")
    document = {"rows": {"float32": [["forward", 64, 32, 16, 1.2, 2.0]] * 9}, "none": {}, "of": []}
    text = common.text(document)
    assert text.count('\n   ["forward", 64, 32, 16, 1.2, 2.0]') == 9
    assert json.loads(text) == document
    for name in kernels.tables.READERS:
        shipped = (kernels.tables.TABLES / name).read_text()
        assert common.text(json.loads(shipped)) + "\n" == shipped


# --- the report --------------------------------------------------------------------------------------------


def result(impl, us, speedup, mode="forward", flops=0, traffic=0, **more):
    info = {"impl": impl, "label": impl.upper(), "case": "one", "shape": [4, 2, 2], "dtype": "float32", "mode": mode}
    info |= {"flops": flops, "bytes": traffic, "interleaved_us": us, "interleaved_spread": 0.01}
    info |= {"speedup_over_eager": speedup, "speedups_over_eager": [speedup]}
    return {"extra_info": info | more}


def document(*benchmarks):
    return {
        "machine_info": {
            "machine": "x86_64",
            "cpu": {"brand_raw": "Some CPU"},
            "threads": 2,
            "versions": {"torch": "9.9", "cuda": None},
            "limits": {"copy_bytes_per_s": 1e9, "flops_per_s": {"float32": 1e12}, "last_level_cache_bytes": 1000},
        },
        "datetime": "2026-01-02T03:04:05",
        "benchmarks": list(benchmarks),
    }


TINY = document(
    result("eager", 200.0, 1.0, flops=50_000_000),
    result("fused", 100.0, 2.0, flops=50_000_000),
    result("compiled", 250.0, 0.8, flops=50_000_000),
    result("eager", 80.0, 1.0, mode="forward+backward", traffic=5000, interleaved_spread=0.5),
    result("fused", 10.0, 8.0, mode="forward+backward", traffic=5000),
    {"extra_info": {"case": "a run without timings"}},
)


def test_report(bench):
    report = bench("report_tables")
    rows, labels = report.read(TINY)
    assert labels == {"eager": "EAGER", "fused": "FUSED", "compiled": "COMPILED"}
    assert report.means(rows) == pytest.approx({"forward": 2, "forward+backward": 8, "all rows": 4})
    text = report.markdown(TINY)
    assert "Some CPU, threads: 2; torch 9.9; 2026-01-02" in text
    assert "forward 2.00x, forward+backward 8.00x, all rows 4.00x" in text
    # 50 Mflop at 1 Tflop/s are 50 us; 5,000 bytes at 1 GB/s are 5.
    assert "| one | 4 x 2 x 2 | float32 | forward | 200 | 100 | **2.00x** | 50%, arithmetic | 250 (0.80x) |" in text
    assert "| one | 4 x 2 x 2 | float32 | forward+backward | 80.0 | 10.0 | **8.00x** ~ | 50%, memory |  |" in text


def test_limits_that_say_nothing_are_left_out(bench):
    least = bench("report_tables").least_us
    limits = TINY["machine_info"]["limits"]
    assert least(10**9, 10**7, "float32", None) == (None, "")
    assert least(10**9, 10**5, "float32", limits) == (1000, "arithmetic")
    assert least(10**9, 10**7, "float32", limits) == (10_000, "memory")
    assert least(10**9, 1999, "bfloat16", limits) == (None, ""), "in cache, and no rate for the dtype"
    assert least(10**5, 100, "float32", limits) == (None, ""), "under a microsecond launches decide"


def trained(impl, us, speedup, members=None, **more):
    info = {"impl": impl, "label": impl.upper(), "case": f"xor-{members}", "sizes": [2, 2, 1], "samples": 4}
    info |= {"batch_size": None, "members": members, "optimizer": "SGD", "us_per_net_step": us, "spread": 0.01}
    return {"extra_info": info | {"speedup_over_eager": speedup} | more}


def training_document():
    found = document(
        trained("eager", 200.0, 1.0),
        trained("fit", 10.0, 20.0),
        trained("compiled", 400.0, 0.5),
        trained("eager", 200.0, 1.0, members=64, spread=0.5),
        trained("fit", 0.4, 512.0, members=64),
        trained("eager", 200.0, 1.0, members=1024),
        trained("fit", 0.05, 4096.5, members=1024),
        {"extra_info": {"case": "a run without timings"}},
    )
    found["machine_info"]["suite"] = "training"
    return found


def test_report_of_training_loops(bench, tmp_path):
    report = bench("report_training")
    rows, labels = report.read(training_document())
    assert labels == {"eager": "EAGER", "fit": "FIT", "compiled": "COMPILED"}
    assert [(row.members, row.us["fit"]) for row in rows] == [(None, 10.0), (64, 0.4), (1024, 0.05)]
    text = report.markdown(training_document())
    assert "| xor-None | 2-2-1, SGD, batch 4 |  | 200 | 10 | **20x** | 400 (0.50x) |" in text
    assert "| xor-64 | 2-2-1, SGD, batch 4 | 64 | 200 | 0.4 | **512x** ~ |  |" in text
    assert "**4,100x**" in text
    assert "Before its first step" not in text
    assert text.endswith("Timed on 2026-01-02; the run has recorded no commit.\n")


@pytest.mark.parametrize(
    ("dirty", "said"), [(True, "with changes that were not committed"), (False, "without other changes")]
)
def test_a_run_says_which_sources_were_timed(bench, dirty, said):
    commit = {"id": "0123456789abcdef", "dirty": dirty}
    for suite, document in (("report_tables", TINY), ("report_training", training_document())):
        text = bench(suite).markdown(document | {"commit_info": commit})
        assert text.endswith(f"\nTimed on 2026-01-02 at commit 0123456, {said}.\n")


@pytest.mark.parametrize(
    ("ratio", "said"),
    [(0.349, "0.35x"), (1, "1.00x"), (9.999, "10x"), (10.73, "10.7x"), (99.96, "100x"), (3028, "3,030x")],
)
def test_ratios_have_three_digits(bench, ratio, said):
    assert bench("report_style").times(ratio) == said
    assert bench("report_style").times(ratio, noisy=True, bold=True) == f"**{said}** ~"


def test_loops_by_machine(bench):
    report, ours, others = bench("report_training"), training_document(), training_document()
    jax = trained("jax", 20.0, 10.0, first_call_seconds=0.26)
    ours["benchmarks"] += [jax, trained("vmap", 2.0, 100.0, members=1024)]
    ours["benchmarks"][1]["extra_info"]["speedup_over_jax"] = 2.0
    seen_elsewhere = [trained("eager", 30.0, 1.0, members=9), trained("fit", 0.5, 60.0, members=9)]
    others["benchmarks"][-3:] = seen_elsewhere  # and a case that the other machine has not seen
    header, _, *rows = report.loops_by_machine({"ours": ours, "others": others})
    assert header == "| network | networks | EAGER | `fit` | speed-up | over JAX | VMAP | others: speed-up | over JAX |"
    assert rows[0].endswith("| 20x | **2.00x** |  | 20x |  |")
    # Marked where what it is a ratio of has scattered: eager did, of 64 networks.
    assert rows[1].endswith("| 512x ~ |  |  | 512x ~ |  |")
    assert rows[-2].endswith("| 4,100x |  | 100x |  |  |")
    assert rows[-1].endswith("| 9 (ensemble) |  |  |  |  |  | 60x |  |")
    assert "Before its first step JAX took up to 0.3 s" in report.markdown(ours)


def test_short_tables_show_rows_that_lose(bench):
    report = bench("report_summary")
    cases = {"even": (1.0, 0.5), "lost": (1.0, 1.25), "good": (2.0, 1.0)}  # speed-ups, torch.compile's behind ours
    found = document(
        *(
            result(impl, 100 / ratio, ratio, case=case)
            for case, (ours, compiled) in cases.items()
            for impl, ratio in (("eager", 1.0), ("fused", ours), ("compiled", compiled))
        )
    )
    _, _, *rows, _, _, said = report.against_others({"layers": found})
    assert said == "Timed on 2026-01-02 (layers)."
    assert [row.split(" | ")[-1] for row in rows] == ["**2.00x** |", "**1.00x** |", "**0.80x** |"]
    assert rows[-1].startswith("| layers, worst of 3: 4 rows, 2-2, forward | 100 | 80 |  |  | 100 |")
    _, _, row = report.over_eager({"here": found})
    assert row == "| here | 2026-01-02 | float32 | 3 | 1.26x | 1.00x | 2.00x | 2 | 0.85x |"
    loops = training_document()
    loops["benchmarks"] += [trained("jax", 20.0, 10.0), trained("vmap", 0.04, 5000.0, members=1024)]
    loops["benchmarks"][1]["extra_info"]["speedup_over_jax"] = 1.9
    _, _, *rows, _, _, _ = report.against_others({"training": loops})
    assert rows[1].endswith("| **512x** ~ |")
    assert rows[0] == "| training, one network: 2-2-1, SGD, batch 4 | 200 | 400 | 20 |  | 10 | **1.90x** |"
    assert rows[-1] == "| training, `Ensemble` of 1,024: 2-2-1, SGD, batch 4 | 200 |  |  | 0.04 | 0.05 | **0.82x** |"


def kernelbench_document():
    shape = [8, *[64] * 12]
    found = document(
        result("eager", 200.0, 1.0, shape=shape, errors={"y": 3e-7, "worst": 0.02}),
        result("fused", 100.0, 2.0, shape=shape, errors={"y": 4e-7, "worst": 0.03}),
        result("eager_tf32", 20.0, 10.0, shape=shape, errors={"y": 8e-4, "worst": 7.25}),
        result("split_bf16x3", 25.0, 8.0, shape=shape, errors={"y": 4e-6, "worst": 0.4}),
    )
    for benchmark, us in zip(found["benchmarks"][1::2], (80.25, 12.5), strict=True):
        benchmark["extra_info"] |= {"predicted_chip": "H200", "predicted_limit_us": us, "predicted_us": 2 * us}
    found["machine_info"] |= {"suite": "kernelbench", "missed": ["one float32 forward, SPLIT: y is off by 1.00e-03"]}
    return found


def test_report_of_kernelbench(bench, tmp_path):
    text = bench("report_tables").markdown(kernelbench_document())
    assert text.startswith("# KernelBench: ")
    cells = ["one", "8 x 64 (12 times)", "float32", "forward", "200", "100", "**2.00x**", ""]
    cells += ["20.0 (10.00x)", "25.0 (8.00x)", "80.2", "160"]
    assert f"| {' | '.join(cells)} |" in text
    assert text.count("| H200 model: limit, us |") == 2
    # Who misses KernelBench's tolerance is shown as such, and who is not even shown is named.
    assert "| one | EAGER_TF32 | 8.0e-04 | 7.2, beyond it |  |  |" in text
    assert "| one | SPLIT_BF16X3 | 4.0e-06 | 0.4 | 12.5 | 25.0 |" in text
    assert "Not timed, since they miss the truth: one float32 forward, SPLIT: y is off by 1.00e-03." in text
    assert "torch operations behind the layers" in text
    assert "neither is an fp32 product" in text
    # Without a model's word, and without a tolerance, there are no columns for them.
    assert "H200" not in bench("report_tables").markdown(TINY)
    assert "worst element" not in bench("report_tables").markdown(TINY)


@pytest.mark.parametrize(
    ("family", "model", "kind", "said"),
    [
        (25, 17, "AMD", "AMD EPYC (Zen 4)"),
        (26, 2, None, "AMD EPYC (Zen 5)"),
        (1, 1, "AMD", "AMD EPYC"),
        (6, 1, "Intel AMX", "AMD EPYC (Intel AMX, family 6 model 1)"),
    ],
)
def test_machines_are_called_by_their_generation(family, model, kind, said, bench):
    info = {"cpu": {"brand_raw": "AMD EPYC", "family": family, "model": model}, "threads": 2, "versions": {}}
    info |= {"machine": "x86_64"} | ({"cpu_kind": kind} if kind else {})
    found = bench("report_style").machine({"machine_info": info, "datetime": "2026-01-01T00:00:00"})
    assert found.startswith(f"{said}, threads: 2; ")


@pytest.mark.slow
def test_reports_have_pictures(bench, tmp_path):
    pytest.importorskip("matplotlib")
    networks = document(
        *(
            result(impl, us * rows / 100, us / 50, case=f"net-{rows}", shape=[rows, 64, 64, 64], mode=mode)
            for rows in (1024, 4096)
            for mode in ("forward", "forward+backward")
            for impl, us in (("eager", 100.0), ("fused", 50.0))
        )
    )
    networks["machine_info"]["suite"] = "mlp"
    wanted = {"kernelbench": (kernelbench_document(), ["speedup"]), "mlp": (networks, ["speedup", "throughput"])}
    wanted |= {"training": (training_document(), ["step", "ensembles"]), "tiny": (TINY, ["speedup", "limits"])}
    for name, (content, pictures) in wanted.items():
        source = tmp_path / f"{name}.json"
        source.write_text(json.dumps(content))
        written = bench("report").write(source, tmp_path / "out")
        assert written[0].name == f"{name}.md"
        drawn = {path.name: path.read_bytes() for path in written[1:]}
        assert drawn.keys() >= {f"{name}-{picture}.png" for picture in pictures}
        assert all(picture.startswith(b"\x89PNG") and len(picture) > 5000 for picture in drawn.values())


def test_texts_hold_what_the_results_say(bench):
    report = bench("report")
    held = list(report.holders())
    assert report.ROOT / "README.md" in held
    texts = [path.read_text(encoding="utf-8") for path in held]
    for path, text in zip(held, texts, strict=True):
        assert text == report.with_tables(text), f"{path}: python benches/report.py"
    assert {found[2] for text in texts for found in report.HELD.finditer(text)} == set(report.TABLES)
    # A figure that somebody types in does not stay, and no other text is touched.
    for text in texts:
        for table in report.HELD.finditer(text):
            figure = re.search(r"[\d.,]+x(\*\*)? \|", table[0])
            changed = text.replace(table[0], table[0].replace(figure[0], f"9.99x{figure[1] or ''} |", 1))
            assert report.with_tables(changed) == text != changed
    assert report.with_tables("1.24x") == "1.24x"
    with pytest.raises(KeyError, match="none"):
        report.with_tables("<!-- table none begin -->\n<!-- table none end -->\n")


def test_texts_are_rewritten(bench, tmp_path, monkeypatch, capsys):
    report = bench("report")
    text = "Before.\n<!-- table training begin -->\n| old |\n<!-- table training end -->\nAfter.\n"
    (tmp_path / "docs").mkdir()
    for name in ("docs/a.md", "docs/a.txt", "b.md"):
        (tmp_path / name).write_text(text if name != "b.md" else "Nothing to write.\n")
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.main([]) == 0
    assert capsys.readouterr().out == f"written: {tmp_path / 'docs/a.md'}\n"
    written = (tmp_path / "docs/a.md").read_text()
    assert written.startswith("Before.\n<!-- table training begin -->\n| network | networks | eager loop | `fit` |")
    assert written.endswith("|\n<!-- table training end -->\nAfter.\n")
    assert (tmp_path / "docs/a.txt").read_text() == text


# --- files appear whole or not at all ----------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(bench, tmp_path, monkeypatch):
    atomic = bench("atomic")
    target = tmp_path / "table.json"
    atomic.write(target, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
        with pytest.raises(OSError, match="disk full"):
            atomic.write(target, "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    atomic.write(target, b"new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("content", "code", "files"),
    [
        (json.dumps(TINY), 0, "layers-cpu"),
        (json.dumps(TINY), 1, "layers-cpu-incomplete"),
        (json.dumps(TINY)[:100], 2, None),
        (json.dumps(TINY)[:100], 0, None),
        (None, 1, None),
    ],
    ids=["passed", "some-failed", "interrupted", "half", "nothing"],
)
def test_driver_publishes_only_whole_results(bench, tmp_path, monkeypatch, capsys, content, code, files):
    run = bench("run")
    script = "import pathlib, sys\nif sys.argv[2]: pathlib.Path(sys.argv[1]).write_text(sys.argv[2])\nsys.exit({})"
    monkeypatch.setattr(
        run, "command", lambda options, output: [sys.executable, "-c", script.format(code), output, content or ""]
    )
    returned = run.main(["--out", str(tmp_path)])
    assert returned == (code or (0 if files else 1))
    found = {
        path.name.partition(".")[0].removesuffix("-speedup").removesuffix("-limits") for path in tmp_path.iterdir()
    }
    assert found == ({files} if files else set())
    if files:
        assert json.loads((tmp_path / f"{files}.json").read_text()) == TINY


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_driver_leaves_nothing(tmp_path, number):
    out, pid = tmp_path / "out", tmp_path / "pid"
    child = (
        "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text('{half');"
        "pathlib.Path(sys.argv[2] + '.new').write_text(str(os.getpid())); os.rename(sys.argv[2] + '.new', sys.argv[2]);"
        "time.sleep(60)"
    )
    code = (
        "import sys, run; run.command = lambda _, output: [sys.executable, '-c', sys.argv[1], output, sys.argv[2]];"
        "sys.exit(run.main(['--out', sys.argv[3]]))"
    )
    driver = in_benches(code, child, pid, out, stderr=subprocess.DEVNULL)
    try:
        until = time.monotonic() + 30
        while not pid.exists():
            assert time.monotonic() < until
            time.sleep(0.01)
        driver.send_signal(number)
        assert driver.wait(30) != 0
    finally:
        driver.kill()
        driver.wait()
    assert not out.exists() or not list(out.iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_driver_asks_for_what_it_was_told(bench, tmp_path, monkeypatch):
    run, seen = bench("run"), []
    monkeypatch.setattr(run, "run_to_end", lambda arguments: seen.extend(arguments) or 3)
    options = ["--cases", "narrow", "--quick", "--device", "cuda", "--seconds", "9", "--suite", "mlp"]
    assert run.main(["--out", str(tmp_path), *options]) == 3
    assert {"--suite=mlp", "--suite-quick", "--suite-device=cuda", "--suite-seconds=9.0", "(narrow)"} <= set(seen)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suite", ["layers", "mlp", "kernelbench"])
def test_a_rehearsal_has_something_to_run(bench, tmp_path, suite):
    options = argparse.Namespace(
        suite=suite, toy=True, cases=None, dtypes=None, quick=False, seconds=None, autotune=False
    )
    arguments = bench("run").command(options, tmp_path)
    assert f"--suite={suite}" in arguments
    words, _, rest = arguments[arguments.index("-k") + 1].strip("(").partition(")")
    names = [case.name for case, _ in bench("stack_cases").cases(suite, "cpu")]
    assert rest == " and not compiled"
    assert 0 < sum(any(word in name for word in words.split(" or ")) for name in names) < len(names)


# --- tables of tiles -----------------------------------------------------------------------------------------------


TUNERS = {"layers": "gpu_tiles.json", "networks": "mlp_tiles.json", "wide": "wide.json"}


@pytest.mark.slow
@pytest.mark.parametrize("name", TUNERS)
def test_what_the_tables_hold_is_what_was_tried(bench, name):
    pytest.importorskip("triton")
    common, table = bench("tuning.common"), TUNERS[name]
    document = common.load(table, Path("nowhere"))
    rows, cells = common.rows_of(document), list(bench(f"tuning.{name}").cells())
    # In the order of the cells, at most one of each.
    turn = {tile: at for at, cell in enumerate(cells) for tile in cell}
    turns = [turn[dataclasses.replace(row, programs_per_sm=1)] for row in rows]
    assert turns == sorted(set(turns))
    assert json.loads(common.text(common.with_rows(document, rows))) == document
    assert common.search(f"tuning.{name}", cells, rows, "no such cell", True, 1) == rows


class Searched:
    """A pool whose compiler finds tiles of at most 32 rows clean."""

    def __init__(self, *_):
        self.tried = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def map(self, first_clean, tuners, tasks):
        self.tried += tasks
        for task in tasks:
            row = next((row for row in task if row.block_m <= 32), None)
            yield row and dataclasses.replace(row, programs_per_sm=3)


def test_a_search_goes_on_where_the_table_is(bench, monkeypatch):
    common, pool = bench("tuning.common"), Searched()
    monkeypatch.setattr(common, "ProcessPoolExecutor", lambda *_: pool)

    def row(k, block_m, programs=1):
        return tables.TileRow("sm_90", "linear_act_fwd", "half", "aligned", (k, 16), block_m, 4, 2, programs)

    cells = [[], *([row(k, block_m) for block_m in (128, 64, 32, 16)] for k in (16, 32, 64))]
    old = [row(16, 32, 2), row(64, 16, 9)]

    def search(only="", resume=False, old=old):
        pool.tried.clear()
        return common.search("tuning.layers", cells, old, only, resume, 1)

    assert search() == [row(k, 32, 3) for k in (16, 32, 64)]
    assert pool.tried == cells[1:]
    # From the table's tile on, with the fewest programs that any triton found; what the table has not stays out.
    assert search(resume=True) == [row(16, 32, 2), row(64, 16, 3)]
    assert pool.tried == [cells[1][2:], cells[3][3:]]
    assert search("half/aligned/32x16") == [old[0], row(32, 32, 3), old[1]]
    assert search("half/aligned/32x16", resume=True) == old
    assert search("sm_80") == old
    assert search(resume=True, old=[]) == []
    # Nothing is dropped in silence.
    for options in ({"only": "half"}, {"resume": True}):
        with pytest.raises(ValueError, match="no candidates any more"):
            search(old=[row(128, 32)], **options)


@pytest.mark.more
def test_tiles_are_found_by_compiling(bench):
    triton = pytest.importorskip("triton")
    common = bench("tuning.common")
    # The table has the fewest programs of the tritons that it names; with another one fewer may fit.
    document = common.load("wide.json", Path("nowhere"))
    known, rows = triton.__version__ in document["triton"], common.rows_of(document)
    for kind in ("tf32x3", "dgrad-half", "wgrad-bf16x3"):
        row = [row for row in rows if (row.op, row.product, row.layout) == kernels.tables.wide_key(kind)][-1]
        found = common.first_clean("tuning.wide", [row])
        assert found.programs_per_sm >= (row.programs_per_sm if known else 1)
    assert common.first_clean("tuning.wide", []) is None
    # Shared memory, and a tile whose products are lost or whose registers spill: the next one is taken.
    for product, tile in (("half", (128, 256, 64, 8, 5, 2)), ("tf32x3", (128, 256, 32, 8, 3, 2))):
        m, n, k, num_warps, num_stages, subtiles = tile
        shape = ("tma", (k, n), m, num_warps, num_stages, 1, True, subtiles)
        bad = tables.TileRow("sm_90", "linear_act_fwd", product, *shape)
        good = [row for row in rows if (row.chip, row.op, row.product) == ("sm_90", bad.op, product)][-1:]
        assert common.first_clean("tuning.wide", [bad, *good]).wide_tile == good[0].wide_tile


def test_tiles_that_chips_share_are_clean_on_all(bench, monkeypatch):
    pytest.importorskip("triton")
    from perceptriton.kernels.gpu import aot

    common, tried = bench("tuning.common"), []

    def compile_for(arch, launch):
        tried.append((arch, launch.arguments["BLOCK_M"]))
        return aot.Resources(32, 8 * (tried[-1] == (89, 64)), 1024, 1, {}, {})

    monkeypatch.setattr(aot, "compile_for", compile_for)
    rows = [tables.TileRow("sm_86", "linear_act_fwd", "half", "aligned", (16, 16), m, 1, 2, 1) for m in (64, 32)]
    # Both have room for 48 warps, 8.9 for 24 programs, and 8.6 for 16.
    assert common.first_clean("tuning.layers", rows) == dataclasses.replace(rows[1], programs_per_sm=16)
    assert tried == [(86, 64), (89, 64), (86, 32), (89, 32)]


def test_measured_rows_join_the_table(bench, tmp_path):
    common, tune = bench("tuning.common"), bench("tuning.measured")
    copy = tmp_path / "wide.json"
    document = shipped = common.load("wide.json", copy)
    tile = kernels.tables.wide_row(next(iter(kernels.plan.wide_candidates("half", 90))))
    for shape, us in (((64, 64, 64), 3.0), ((128, 64, 64), 5.0), ((64, 64, 64), 4.0)):
        row = {"shape": list(shape), "tile": tile, "us": us, "library_us": 6.0}
        document = tune.updated(document, "some device", "half", row)
    assert shipped["devices"] == {}
    measured = document["devices"]["some device"]
    # Measured again, a shape has one row, the new one.
    assert [(row["shape"], row["us"]) for row in measured["rows"]["half"]] == [
        ([128, 64, 64], 5.0),
        ([64, 64, 64], 4.0),
    ]
    assert measured["torch"] == torch.__version__
    common.write(copy, document, "wide.json")
    assert json.loads(copy.read_text()) == document
    # What a plan would refuse to read is not written.
    bad = tune.updated(document, "some device", "half", row | {"tile": [16, *tile[1:]]})
    with pytest.raises(ValueError, match="none of the tiles"):
        common.write(copy, bad, "wide.json")
    assert json.loads(copy.read_text()) == document


def test_calibration_finds_the_crossing(bench, tmp_path):
    launches = bench("tuning.launches")
    assert launches.case("network", 1 << 23).rows * 64 * 2 * 2 == 1 << 23
    sizes = (1, 2, 4, 8)
    for speedups, found in (
        ((0.5, 0.5, 0.5, 2.0), round(4 * 2**0.5)),  # halfway, in logarithms
        ((0.5, 2.0, 0.9, 1.0), 8),  # from where on all are
        ((1.0, 1.1, 1.2, 1.3), 0),
        ((1.0, 1.1, 1.2, 0.99), None),
    ):
        assert launches.crossing(sizes, speedups) == found
    rows = [
        {"network": name, "mode": mode, "bytes": nbytes, "speedup": nbytes / (3 if mode == "forward" else 6)}
        for name in launches.LAYERS
        for mode in launches.MODES
        for nbytes in sizes
    ]
    about = {"device": "some", "torch": "2", "triton": "3", "date": "today"}
    whole, part = (launches.document(own, sizes, about) for own in (rows, rows[:-1]))
    # A run that was cut off says nothing of what is not complete.
    assert [(own["layer"], own["network"]) for own in (whole, part)] == [([3, 6], [3, 6]), ([3, 6], [3, None])]
    table = tmp_path / "launches.json"
    with pytest.raises(SystemExit, match="not complete"):
        launches.adopt(part, table)
    assert not table.exists()
    launches.adopt(whole, table)
    found = tables.read_launches(json.loads(table.read_text()))["devices"]
    assert found == {"some": {"torch": "2", "triton": "3", "date": "today", "layer": [3, 6], "network": [3, 6]}}


def test_every_tuner_has_its_command(bench, capsys):
    tune = bench("tune")
    for name in tune.MODULES:
        with pytest.raises(SystemExit) as end:
            tune.main([name, "--help"])
        assert end.value.code == 0
        assert capsys.readouterr().out.startswith(f"usage: tune.py {name} ")
    with pytest.raises(SystemExit):
        tune.main(["tiles"])


TUNE = """
import sys
import tune
from tuning import measured
if (kernel := sys.argv.pop(1)) != "right":
    import os
    os.environ["TRITON_INTERPRET"] = "1"
    from perceptriton.kernels.gpu import wide
    first = []
    def off(plan, by):
        first[:] = first or [plan.tile]
        return by if kernel == "wrong" or plan.tile == first[0] else by - by
    right, dgrad, wgrad = wide.linear_act_fwd, wide.linear_act_dgrad, wide.linear_act_wgrad
    wide.linear_act_fwd = lambda x, weight, bias, act, plan: right(x, weight, bias + off(plan, 0.1), act, plan)
    wide.linear_act_dgrad = lambda dz, weight, *rest: dgrad(dz, (1 + off(rest[-1], 0.1)) * weight, *rest)
    wide.linear_act_wgrad = lambda dz, h, plan: wgrad(dz, (1 + off(plan, 0.1)) * h, plan)
measured.TOYS = measured.TOYS[:1]
tune.main()
"""


@pytest.mark.more
@pytest.mark.parametrize("kind", ["bf16x6", "tf32", "dgrad-half", "wgrad-tf32x3"])
@pytest.mark.parametrize("kernel", ["right", "wrong", "one-wrong"])
def test_tuning_rehearsed(kernel, kind, tmp_path):
    pytest.importorskip("triton")
    out = tmp_path / "wide.json"
    arguments = ("measure", "--dry-run", "--kinds", kind, "--seconds", "0", "--out", out, "--resume")
    process = in_benches(TUNE, kernel, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, errors = process.communicate(timeout=300)
    # Tiles whose results are wrong are passed over and said at the end; without any other, a shape has no row.
    tiles = sum(line.startswith(kind) and ": error " in line for line in errors.splitlines())
    assert (process.returncode == 0) == (kernel == "right"), errors
    if kernel == "wrong":
        assert tiles >= 2
        assert not out.exists()
        return
    assert (tiles > 0) == (kernel == "one-wrong")
    (row,) = json.loads(out.read_text())["devices"]["DRY RUN on a CPU"]["rows"][kind]
    assert row["shape"] == ([72, 70, 264] if kind.startswith("wgrad") else [70, 264, 72])
    assert "grad" in kind or row["tile"] is None  # an interpreted kernel wins nothing against torch
    assert min(row["us"], row["library_us"]) > 0
    # A second run goes on where the first one ended, which is at the end.
    before = out.read_bytes()
    process = in_benches(TUNE, "wrong", *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.communicate(timeout=300)[0].startswith(f"{out}: ")
    assert out.read_bytes() == before
