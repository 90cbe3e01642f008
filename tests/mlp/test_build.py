# SPDX-License-Identifier: Apache-2.0
"""`perceptriton build --sizes`: what it refuses, what it says, and that launches find what it has compiled."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from perceptriton.kernels import devices, peaks
from perceptriton.mlp import doctor
from perceptriton.mlp.__main__ import main

ROOT = Path(__file__).parents[2]
AHEAD = ["build", "--sizes", "64,16", "--chip", "sm_90"]
CHIPS = (
    "sm_86, sm_89, sm_120, sm_80, sm_90, sm_100, RTX 3090, RTX 4090, RTX 5090, A10, L4, L40S, A100, H100, H200, B200"
)
needs_triton = pytest.mark.skipif(not devices.has_triton(), reason="triton is not installed")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "64"], "argument --sizes: an input and an output width are the least, not '64'"),
        (["--sizes", "64,x"], "argument --sizes: 'x' is not a whole number"),
        (["--sizes", "64,0"], "argument --sizes: must be at least 1, not 0"),
        (["--sizes", "64,16", "--rows", "0"], "argument --rows: must be at least 1, not 0"),
        (
            ["--sizes", "64,16", "--chip", "sm_1"],
            "argument --chip: 'sm_1' is none of sm_86, sm_89, sm_120, sm_80, sm_90, sm_100, RTX 3090, "
            + "RTX 4090, RTX 5090, A10, L4, L40S, A100, H100, H200, B200",
        ),
        (["--chip", "sm_90"], "argument --chip: of a network, whose --sizes are not given"),
        (["--rows", "32"], "argument --rows: of a network, whose --sizes are not given"),
    ],
    ids=" ".join,
)
def test_bad_arguments_are_refused(arguments, message, capsys):
    try:
        code = main(["build", *arguments])
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert capsys.readouterr().err == f"perceptriton: error: {message}\n"


def test_without_triton_there_is_nothing_to_compile(monkeypatch, capsys):
    monkeypatch.setattr(devices, "has_triton", lambda: False)
    assert main(AHEAD) == 1
    assert capsys.readouterr().err == "perceptriton: triton is not installed\n"


@needs_triton
def test_without_a_device_the_chip_has_to_be_named(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "has_cuda", lambda: False)
    assert main(AHEAD[:3]) == 1
    expected = "perceptriton: torch finds no CUDA device here; --chip names one, as in --chip sm_90\n"
    assert capsys.readouterr().err == expected


@pytest.fixture
def ahead(monkeypatch):
    pytest.importorskip("triton", reason="triton is not installed")
    from perceptriton.kernels.gpu import build

    monkeypatch.setattr(build, "INTERPRETED", False)
    return build


def test_under_the_interpreter_there_is_no_compiler(ahead, monkeypatch, capsys):
    monkeypatch.setattr(ahead, "INTERPRETED", True)
    assert main(AHEAD) == 1
    assert "TRITON_INTERPRET=1" in capsys.readouterr().err


def test_each_kernel_has_a_line(ahead, monkeypatch, capsys):
    orders = []

    def build(order):
        orders.append(order)
        yield ahead.Kernel("one_kernel", 32, 1.25)
        yield ahead.Kernel("another", 65536, 0.0)

    monkeypatch.setattr(ahead, "build", build)
    assert main([*AHEAD, "--dtype", "bfloat16", "--rows", "7,9"]) == 0
    lines = re.findall(r"^(\w+) +([\d,]+) rows +(\d\.\d) s$", capsys.readouterr().out, re.M)
    assert lines == [("one_kernel", "32", "1.2"), ("another", "65,536", "0.0")]
    (order,) = orders
    assert order == ahead.Order((64, 16), "bfloat16", "ieee", "sigmoid", (7, 9), peaks.chip("sm_90"), False)


def test_where_torch_computes_everything_it_says_so(ahead, monkeypatch, capsys):
    monkeypatch.setattr(ahead, "build", lambda order: iter(()))
    assert main(AHEAD) == 0
    assert capsys.readouterr().out.endswith("none: torch's own products take all layers\n")


def test_what_the_compiler_cannot_do_is_a_failure(ahead, monkeypatch, capsys):
    def build(order):
        raise RuntimeError("ptxas\nfailed")
        yield

    monkeypatch.setattr(ahead, "build", build)
    assert main(AHEAD) == 1
    assert capsys.readouterr().err == "perceptriton: RuntimeError: ptxas failed\n"


# --- launches --------------------------------------------------------------------------------------------------------

# On a driver that does nothing, through triton's own launcher: {"compiled": what no cache had, "launches": how many}.
LAUNCHES = """
import json, sys, tempfile, pathlib
sys.path.insert(0, sys.argv[1])
import torch, chip
from triton import knobs
from perceptriton.mlp import MLP

sizes, dtype, activation, rows = json.loads(sys.argv[2])
compiled = []
knobs.compilation.listener = lambda *, src, cache_hit, **_: cache_hit or compiled.append(src.name)
with tempfile.TemporaryDirectory() as folder:
    driver = chip.Driver(pathlib.Path(folder))
    chip.pretend(driver)
    model = MLP(sizes, activation, device="meta", dtype=getattr(torch, dtype))
    for count in rows:
        x = torch.empty(count, sizes[0], device="meta", dtype=getattr(torch, dtype))
        with torch.no_grad():
            model(x)
        y = model(x)
        y.backward(torch.empty_like(y))
print(json.dumps({"compiled": compiled, "launches": driver.launches()}))
"""


def run(folder, *arguments):
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder), "OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert process.returncode == 0, process.stderr
    return process.stdout


def launch(folder, *case):
    return json.loads(run(folder, "-c", LAUNCHES, ROOT / ".ci" / "cache", json.dumps(case)))


# The same for a device at hand, which is asked for in this process: what gcc is asked for after the kernels are built.
AT_HAND = """
import json, sys, tempfile, pathlib
sys.path.insert(0, sys.argv[1])
import torch, chip
from triton.runtime import build as gcc, driver
from perceptriton.kernels.gpu import build
from perceptriton.mlp import MLP

made, make = [], gcc._build
gcc._build = lambda name, *rest, **options: made.append(name) or make(name, *rest, **options)
with tempfile.TemporaryDirectory() as folder:
    driver._default = own = chip.Driver(pathlib.Path(folder))
    order = build.Order((16, 32, 8), "float32", "ieee", "sigmoid", (65536,), chip.H200, True)
    for number in range(len(build.asked(order))):
        build._compile(order, number)
    made.clear()
    chip.pretend(own)
    y = MLP((16, 32, 8), device="meta")(torch.empty(65536, 16, device="meta"))
    y.backward(torch.empty_like(y))
print(json.dumps({"gcc": made, "launches": own.launches()}))
"""


# (sizes, dtype, activation, rows): why
CASES = {
    # one kernel forward, and back
    "whole network": ((16, 32, 8), "float32", "sigmoid", (32, 65536)),
    # one layer, whose input wants no gradient
    "layer": ((64, 32), "float16", "sigmoid", (1, 65536)),
    # a wide layer, whose gradients take a pass and products of the library, and a narrow one
    "layers": ((300, 256, 64), "bfloat16", "tanh", (20, 65536)),
    # by TMA both ways
    "stack": ((512, 1024, 256), "bfloat16", "sigmoid", (4096,)),
}


@needs_triton
@needs_gcc
@pytest.mark.more
@pytest.mark.compiles
def test_launchers_for_a_device_at_hand_are_compiled_too(tmp_path):
    found = json.loads(run(tmp_path, "-c", AT_HAND, ROOT / ".ci" / "cache"))
    assert found["gcc"] == []
    assert found["launches"] > 1


@needs_triton
@needs_gcc
@pytest.mark.more
@pytest.mark.compiles
@pytest.mark.parametrize("case", CASES)
def test_a_launch_compiles_nothing_after_it(case, tmp_path):
    sizes, dtype, activation, rows = CASES[case]
    options = ["--dtype", dtype, "--activation", activation, "--rows", ",".join(map(str, rows))]
    names = ",".join(map(str, sizes))
    out = run(tmp_path, "-m", "perceptriton.mlp", "build", "--sizes", names, "--chip", "sm_90", *options)
    built = re.findall(r"^(\w+_kernel) +[\d,]+ rows", out, re.M)
    found = launch(tmp_path, sizes, dtype, activation, rows)
    assert found["compiled"] == []
    assert found["launches"] >= len(built) > 1
    # What was not asked for is not there.
    assert launch(tmp_path, sizes, dtype, "relu", rows[:1])["compiled"] != []
