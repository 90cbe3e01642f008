# SPDX-License-Identifier: Apache-2.0
import contextlib
import math
import multiprocessing
import os
import signal
import time

import cases
import compiling
import interpreting
import pytest
import torch

from perceptriton.kernels import calls, plan, records
from perceptriton.kernels.native import ready


def pytest_addoption(parser):
    parser.addoption("--deadline", type=float, metavar="SECONDS", help="start no test after this many: skip it")
    parser.addoption("--first", default="", metavar="MARKERS", help="run tests with these first; see `turn`")
    parser.addoption("--shard", metavar="I/N", help="of N processes that deal the tests out, this is number I from 0")
    parser.addoption("--watch-memory", action="store_true", help="kernels under the interpreter: see tests/watching.py")
    parser.addoption("--compiled-for", metavar="CHIP", help="emulate what is compiled for it, as in sm_90")
    parser.addoption("--cubins", metavar="DIR", help="keep what the compile-only tests compile there")
    parser.addoption("--all-tiles", action="store_true", help="compile what tests/compiled has a row for too")
    parser.addoption("--changed", action="store_true", help="only tests of kernels that tests/ptx/passed.json lacks")
    parser.addoption("--write-traffic", action="store_true", help="write tests/ptx/traffic.json")
    parser.addoption(
        "--write-tiles", action="store_true", help="compile what tests/compiled has no row for, and write it"
    )


def pytest_configure(config):
    if chip := config.getoption("--compiled-for"):
        from ptx.plugin import Emulation

        config.pluginmanager.register(Emulation(chip))


def pytest_report_header():
    return f"FUZZ_SEED={cases.FUZZ_SEED}"


def pytest_terminal_summary(terminalreporter, config):
    for line in config.stash.get(compiling.REPORT, []):
        terminalreporter.write_line(line)


def pytest_ignore_collect(collection_path, config):
    """Leaves out, unread, the files that never name a marker which -m asks for: to import them all takes seconds."""
    expression = config.getoption("markexpr")
    asked = [] if " or " in expression else [term for term in expression.split(" and ") if term.isidentifier()]
    if asked and collection_path.suffix == ".py":
        source = collection_path.read_text()
        return any(name not in source for name in asked) or None
    return None


def pytest_sessionfinish(session, exitstatus):
    if session.config.getoption("--changed") and exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


BEGAN = time.monotonic()


def pytest_runtest_setup(item):
    deadline = item.config.getoption("--deadline")
    if deadline is not None and time.monotonic() - BEGAN > deadline:
        if turn(item) == 0:
            pytest.fail(f"not reached: {deadline:g} s were over before its turn came", pytrace=False)
        # A run that is cut off leaves no report at all.
        pytest.skip(f"not run: {deadline:g} s were over before its turn came")


def turn(item):
    """When a test's turn comes: 0 with the first marker of --first, separated by commas, which must all be reached."""
    first = [marker for marker in item.config.getoption("--first").split(",") if marker]
    # Without any, nothing must be reached.
    return next((place for place, marker in enumerate(first) if item.get_closest_marker(marker)), len(first) or 1)


@pytest.hookimpl(trylast=True)  # pytest itself sorts them by the fixtures that they share
def pytest_collection_modifyitems(config, items):
    if config.getoption("--changed"):
        from ptx import changes

        due = changes.changed()
        config.hook.pytest_deselected(items=[item for item in items if not changes.families(item.nodeid) & due])
        items[:] = [item for item in items if changes.families(item.nodeid) & due]
    items.sort(key=turn)
    if (shard := config.getoption("--shard")) is None:
        return
    mine, count = map(int, shard.split("/"))
    # One process can have 9 GB to itself, not each of them.
    owners = [0 if "wide_memory" in item.fixturenames else index % count for index, item in enumerate(items)]
    config.hook.pytest_deselected(items=[item for item, owner in zip(items, owners, strict=True) if owner != mine])
    items[:] = [item for item, owner in zip(items, owners, strict=True) if owner == mine]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def calls_decided_anew():
    """What tests put in the place of plans, kernels and limits is gone with them."""
    calls.forget()


@pytest.fixture(autouse=True)
def kernels_whatever_the_size(monkeypatch):
    """On a GPU, small eager calls would take plain torch; tests are small, and mean the kernels."""
    if torch.cuda.is_available():
        cases.limit_eager_calls(monkeypatch, 0, 0)


@pytest.fixture(autouse=True)
def compiled_loops_for_those_who_ask(monkeypatch):
    """Whether a short run takes compiled loops of itself depends on what the process has loaded before."""
    monkeypatch.setattr(ready, "seconds", lambda _: (math.inf,) * len(plan.TILES))
    monkeypatch.setattr(ready, "missed", 0.0)


@pytest.fixture(scope="module")
def one_thread():
    """One thread for the tests of a module that train networks of middle size.

    Where other processes take the cores, two threads that wait for each other make a step take forty times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def interruptible():
    """Python's own handler of SIGINT, for child processes too: what a shell starts in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def matmul():
    """torch's settings of products on a GPU, of which that for fp32 comes back after the test."""
    settings = torch.backends.cuda.matmul
    before = settings.fp32_precision
    yield settings
    settings.fp32_precision = before


@pytest.fixture(autouse=True)
def watched_memory(request):
    if not request.config.getoption("--watch-memory"):
        yield
        return
    import watching

    with watching.kernels():
        yield


@pytest.fixture(scope="session")
def device():
    """Where kernels run: "cuda", or "cpu" in triton's interpreter, which then rounds as the hardware does.

    On a CPU fresh memory is NaN as well. On a GPU some of torch's own operations refuse the mode that makes it so.
    """
    found = cases.kernel_device()
    if found is None:
        pytest.skip(cases.NO_KERNELS)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if found == "cuda":
            yield found
            return
        if not cases.EMULATED:
            interpreting.round_bfloat16(monkeypatch)
            interpreting.patch_language_once(monkeypatch)
            interpreting.find_overflow_by_numpy(monkeypatch)
        with cases.poisoned():
            yield found


@pytest.fixture
def poisoned():
    """Fresh memory is NaN, in tests that run on the CPU without kernels too."""
    with cases.poisoned() if not torch.cuda.is_available() else contextlib.nullcontext():
        yield


@pytest.fixture(scope="session")
def compilers():
    """A process on each core, for all suites of a run: to import torch and triton takes each of them seconds."""
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        yield pool


@pytest.fixture
def absent_h200():
    """A driver for a chip that is not there: launches go as far as the compiler."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Driver())
    yield
    driver.set_active(None)  # whatever this machine has, once it is asked for


@pytest.fixture
def force(monkeypatch):
    """force(forward, backward): these plans whatever the shape, so that small layers take the paths of large ones."""

    def force(forward, backward):
        cases.nothing_is_small(monkeypatch)
        monkeypatch.setattr(plan, "linear_act_fwd", lambda *shape: forward)
        monkeypatch.setattr(plan, "linear_act_bwd", lambda *shape: backward)

        def network(own):
            """A plan for a network whose layers all have this one; kernels of layers know no networks."""

            def mlp_plan(m, widths, *_):
                if own.impl != "explicit" or len(widths) == 2:
                    return records.MlpPlan("layers", "the test says so")
                layers = (own,) * (len(widths) - 1)
                return records.MlpPlan("explicit", "the test says so", layers=layers, chunk=own.chunk)

            return mlp_plan

        plan.mlp_both.cache_clear()
        monkeypatch.setattr(plan.network, "mlp_fwd", network(forward))
        monkeypatch.setattr(plan.network, "mlp_bwd", network(backward))

    yield force
    plan.mlp_both.cache_clear()


@pytest.fixture(params=["small", "large"])
def size(request, force):
    """Each test with the plans for small inputs and with those for large ones, whose autograd nodes are our own."""
    if request.param == "large":
        explicit = records.Plan("explicit", "the test says so")
        force(explicit, explicit)
    return request.param


@pytest.fixture(scope="module")
def wide_memory(device):
    """9 GB of addresses, of which only the pages that a test touches take memory on a CPU.

    Views start in the middle, so that an offset that wraps around meets other memory instead of ending the process.
    """
    size = 2**32 + 2**28
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 2 * size + 2**30:
        pytest.skip("needs 10 GB of free GPU memory")
    # The deterministic mode would write to all of it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
        try:
            return torch.empty(size, dtype=torch.float16, device=device)
        except RuntimeError as error:
            pytest.skip(f"9 GB of addresses are not to be had: {error}")
