# SPDX-License-Identifier: Apache-2.0
"""Options, OpenMP binding and machine information of the benchmarks."""

import importlib.metadata
import os
import shutil
import subprocess
import time

import binding  # first of all that may import torch
import numpy
import pytest
import timing
import torch
from stack_cases import DTYPES, SUITES

from perceptriton.kernels import devices

LIMITS = pytest.StashKey[dict]()
NOT_REACHED = pytest.StashKey[list[str]]()
MISSED = pytest.StashKey[list[str]]()

if binding.LATE:
    raise pytest.UsageError(binding.LATE)


def pytest_addoption(parser):
    group = parser.getgroup("suite")
    auto = "cuda" if torch.cuda.is_available() else "cpu"
    suites = (*SUITES, "training")
    group.addoption("--suite", choices=suites, default="layers", help="which cases of bench_stacks.py; or training")
    group.addoption("--suite-device", choices=("cpu", "cuda"), default=auto, help="where to run")
    group.addoption("--suite-dtypes", default=None, help="comma-separated; default: float32, on CUDA bfloat16 too")
    group.addoption("--suite-quick", action="store_true", help="few rounds: to look, not to quote")
    group.addoption(
        "--suite-seconds",
        type=float,
        default=None,
        help="start no case after this many; on CUDA: 180, but for training",
    )
    group.addoption("--suite-autotune", action="store_true", help="time torch.compile max-autotune too (minutes)")


def pytest_configure(config):
    if config.getoption("--suite-device") == "cuda":
        # Only timings on the CPU gain from bound threads; the compilers' worker processes inherit the binding.
        binding.free_main_thread()


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _nvidia_smi(*fields: str) -> list[str] | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--id=0", "--query-gpu=" + ",".join(fields), "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    values = answer.stdout.strip().split(", ")
    return values if answer.returncode == 0 and len(values) == len(fields) else None


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)  # a host's name says nothing about its speed
    device = config.getoption("--suite-device")
    machine_info["device"] = device
    machine_info["suite"] = config.getoption("--suite")
    machine_info["versions"] = {
        "perceptriton": _version("perceptriton") or "source tree",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "numpy": numpy.__version__,
        "cuda": torch.version.cuda,
    }
    if config.getoption("--suite") == "training":
        machine_info["versions"] |= {name: _version(name) for name in ("numba", "jax", "skorch")}
    machine_info["cpu_kind"] = devices.cpu_kind()
    machine_info["threads"] = torch.get_num_threads()
    machine_info["openmp"] = {name: value for name, value in os.environ.items() if name.startswith(("OMP_", "GOMP_"))}
    machine_info["quick"] = config.getoption("--suite-quick")
    machine_info["load_average"] = list(os.getloadavg())
    machine_info["limits"] = config.stash.get(LIMITS, None)
    machine_info["not_reached"] = config.stash.get(NOT_REACHED, [])
    machine_info["missed"] = config.stash.get(MISSED, [])
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        driver = _nvidia_smi("driver_version", "clocks.max.sm", "clocks.max.memory", "power.limit") or [None] * 4
        machine_info["gpu"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "fp32_precision": torch.backends.cuda.matmul.fp32_precision,
            **dict(zip(("driver", "max_sm_clock", "max_memory_clock", "power_limit"), driver, strict=True)),
        }


def _measure_limits(config) -> dict:
    device, dtypes = config.getoption("--suite-device"), config.getoption("--suite-dtypes")
    names = tuple(dtypes.split(",")) if dtypes else DTYPES[device]
    quick = config.getoption("--suite-quick") or device == "cuda"
    return timing.measure_limits(device, names, 0.3 if quick else 2.0)


@pytest.fixture(scope="session")
def limits(pytestconfig):
    """Measures what the machine can do at best before the first and after the last case, for the JSON."""
    if pytestconfig.getoption("benchmark_disable"):
        yield
        return
    pytestconfig.stash[LIMITS] = first = _measure_limits(pytestconfig)
    yield
    pytestconfig.stash[LIMITS] = timing.better_limits(first, _measure_limits(pytestconfig))


@pytest.fixture(scope="session")
def in_time(pytestconfig):
    """in_time(name) skips a group that the time does not suffice for, whose name goes into the JSON."""
    given, began = pytestconfig.getoption("--suite-seconds"), time.monotonic()
    names = pytestconfig.stash.setdefault(NOT_REACHED, [])

    def check(name: str, default: float | None = None) -> None:
        seconds = default if given is None else given
        if seconds is not None and time.monotonic() - began > seconds:
            if name not in names:
                names.append(name)
            pytest.skip(f"not run: {seconds:g} s were over before its turn came")

    return check


@pytest.fixture(scope="session")
def missed(pytestconfig):
    """Which contenders were not timed since they missed the truth, and by how much, into the JSON."""
    return pytestconfig.stash.setdefault(MISSED, [])
