# SPDX-License-Identifier: Apache-2.0
"""What is asked of the compiler before a chip has shown anything: by the tests, by the benchmarks, of every family."""

import contextlib
import functools
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import chip
import pytest
import torch
from triton.compiler import CompiledKernel
from triton.runtime import JITFunction, driver

from perceptriton.kernels import Plan, Tile, allow_fp32_split
from perceptriton.kernels import plan as planning
from perceptriton.kernels.gpu import layer, wide
from perceptriton.kernels.gpu.train import KernelLoop
from perceptriton.kernels.records import TrainConfig
from perceptriton.mlp import MLP, LinearSigmoid

ROOT = Path(__file__).parents[2]
SPLITS = ("bf16x6", "bf16x3")  # that suites time


class Version(CompiledKernel):
    """What takes the place of a compiled kernel: nothing happens when it is launched."""

    function = packed_metadata = module = None

    def __init__(self) -> None:
        pass

    def launch_metadata(self, *_) -> None:
        return None

    def run(self, *_) -> None:
        return None

    def __getitem__(self, grid) -> Callable[..., None]:
        return lambda *_: None


class Asked(dict):
    """(kernel, its version's key) -> (kernel, signature, constants, attributes, options) of all that is asked for."""

    def __enter__(self) -> "Asked":
        def note(kernel, key, signature, device, constants, options, attributes, warmup):
            self[kernel, key] = kernel, signature, constants, attributes, options
            return Version()

        self.compile, JITFunction._do_compile = JITFunction._do_compile, note
        return self

    def __exit__(self, *_) -> None:
        JITFunction._do_compile = self.compile


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def differentiate(y: torch.Tensor) -> None:
    y.backward(torch.empty_like(y))


# --- every family ----------------------------------------------------------------------------------------------------


def families() -> dict[str, Callable[[], object]]:
    """A first launch of each kernel, by name."""
    half = torch.bfloat16
    m, k, n = 4096, 64, 32
    x, weight, bias, y = (empty(*shape, dtype=half) for shape in ((m, k), (n, k), (n,), (m, n)))
    shape = (m, k, n, "bfloat16", "ieee", chip.H200)
    rows = planning.linear_act_fwd(*shape), planning.linear_act_bwd(*shape)
    tiled = Plan("tiled", "", Tile(64, 64, 32, 4, 3), 132)
    passes = Plan("passes", "", Tile(32, 64, 0, 4, 1), 4)
    tile = next(tile for tile in planning.wide_candidates("half", 90) if tile.block_m == tile.block_n == 64)
    tma = Plan("tma", "", tile, 132)
    square = empty(1024, 1024, dtype=half)
    network = MLP((16, 32, 8), device="meta", dtype=half)
    data = empty(m, 16, dtype=half)

    def infer() -> None:
        with torch.no_grad():
            network(data)

    def loop(widths: tuple[int, ...]) -> None:
        config = TrainConfig(widths)
        plan = planning.train(1, 4, 4, config, "float32", chip.H200, None)
        parameters = [empty(1, *shape) for k, n in itertools.pairwise(widths) for shape in ((n, k), (n,))]
        run = KernelLoop(config, parameters, (), (), empty(1), empty(1, 4, 2), empty(1, 4, 1), 4, 0, plan)
        run.run(None, 0, 1000, 10, empty(100, 1))

    return {
        "rows forward": lambda: layer.linear_act_fwd(x, weight, bias, "sigmoid", rows[0]),
        "rows backward and its sums": lambda: layer.linear_act_bwd(y, y, x, weight, "sigmoid", (True,) * 3, rows[1]),
        "tiled forward": lambda: layer.linear_act_fwd(square, square, square[0], "sigmoid", tiled),
        "dz pass and its sums": lambda: layer.act_bwd(square, square, "sigmoid", True, passes),
        "network inference": infer,
        "network forward and backward": lambda: differentiate(network(data)),
        "network and cross entropy": lambda: network.bce_loss(data, empty(m, 8, dtype=half)).backward(),
        "training in a lane": lambda: loop((2, 2, 1)),
        "training in a block": lambda: loop((2, 10, 10, 10, 1)),
        "TMA forward": lambda: wide.linear_act_fwd(square, square, square[0], "sigmoid", tma),
        "TMA dgrad": lambda: wide.linear_act_dgrad(square, square, square, "sigmoid", True, tma),
        "TMA wgrad": lambda: wide.linear_act_wgrad(square, square, tma),
    }


# --- the tests -------------------------------------------------------------------------------------------------------


def hardware() -> None:
    """The networks of tests/kernels/test_gpu.py, which itself needs streams and graphs."""
    for model in (LinearSigmoid(32, 16), MLP([16, 32, 8], "tanh", "sigmoid"), MLP([256, 512, 256])):
        model = model.to("meta")
        x = empty(64, next(model.parameters()).shape[1])
        with torch.no_grad():
            model(x)
        differentiate(model(x))


class OnAbsentChip:
    """A plugin of pytest: tests of kernels run on the CPU's memory, with kernels that do nothing. Some then fail."""

    def __init__(self) -> None:
        self.driver = driver.active

    def pytest_sessionstart(self) -> None:
        import cases

        cases.kernel_device = lambda: "cpu"
        # Nothing was computed: most comparisons are to be passed over, so that a test goes on to its next launch.
        cases.relative_error = lambda *_: 0.0
        torch.testing.assert_close = lambda *_, **__: None
        torch.equal = lambda *_: True

    def pytest_collection_modifyitems(self, items) -> None:
        for item in items:
            if item.get_closest_marker("hardware"):  # the others are skipped for another reason than that
                item.own_markers = [mark for mark in item.own_markers if mark.name != "skipif"]

    def pytest_runtest_setup(self) -> None:
        driver.set_active(self.driver)  # others set drivers of their own and take them away


def tests(expression: str) -> None:
    """What the tests with these markers ask for, up to where each misses a right result."""
    own = ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-p", "no:cacheprovider", "-W", "ignore"]
    pytest.main([*own, "-q", "--tb=no", "-rN", "-m", expression, str(ROOT / "tests")], plugins=[OnAbsentChip()])


# --- the benchmarks --------------------------------------------------------------------------------------------------


def benchmarks(suite: str) -> None:
    """What the cases of a suite ask for, without a number computed."""
    sys.path.insert(0, str(ROOT / "benches"))
    if suite == "training":
        import bench_training

        for case in (case for case in bench_training.CASES if "cuda" in case.devices):
            for impl in (None, "block") if case.ways else (None,):
                with contextlib.suppress(RuntimeError):  # one that trains in a CUDA graph has no kernel of ours
                    bench_training.fitted(bench_training.Problem(case, "cpu"), impl).advance(10)
        return
    import contenders
    import stack_cases

    for case, dtype in stack_cases.cases(suite, "cuda"):
        tensor = functools.partial(empty, dtype=getattr(torch, dtype))
        for mode, split in itertools.product(case.modes, (None, *SPLITS) if dtype == "float32" else (None,)):
            parameters = [tensor(*shape) for k, n in itertools.pairwise(case.sizes) for shape in ((n, k), (n,))]
            ends = tensor(case.rows, case.sizes[0]), tensor(case.rows, case.sizes[-1])
            problem = contenders.Problem(case, mode != "forward", ends[0], tuple(parameters), ends[1])
            allow_fp32_split(split)
            with torch.set_grad_enabled(problem.training):
                contenders.fused(problem).step()
            allow_fp32_split(None)
