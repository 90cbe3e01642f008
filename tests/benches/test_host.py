# SPDX-License-Identifier: Apache-2.0
"""What calls ask of the host, on a driver that does nothing: that kernels are launched, how often, and for whom."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.more,
    pytest.mark.compiles,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed"),
]


def run(*command):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=500)
    assert process.returncode == 0, process.stderr
    return process.stdout


def test_the_host_is_timed(tmp_path):
    table = run(ROOT / "benches" / "tune.py", "host", "--rounds", "2", "--out", tmp_path / "host.json")
    rows = json.loads((tmp_path / "host.json").read_text())["rows"]
    assert table.count("us") == 2 * len(rows)
    for autocast in (False, True):
        own = [row for row in rows if row["autocast"] == autocast]
        launches = {(row["layers"], row["training"]): row["launches"] for row in own}
        assert [launches[layers, False] for layers in (1, 2, 4, 8)] == [1] * 4
        # Back, a kernel for each segment: two layers of this width.
        assert [launches[layers, True] for layers in (1, 2, 4, 8)] == [2, 2, 3, 5]
        # Bounds that a busy machine keeps: with a search of the version for each launch these would be 1.8 and 2.1, and
        # with a plan for each call under autocast 2.9 and 1.8.
        ratios = {(row["layers"], row["training"]): row["ratio"] for row in own}
        assert ratios[4, False] < 1 + autocast
        assert ratios[4, True] < 1.5


# The README's example, and layers that a user of torch would write first, as if their tensors were on an H200.
EAGER = """
import pathlib, sys, tempfile
sys.path.insert(0, sys.argv[1])
import chip, torch
from torch import nn
from perceptriton.mlp import MLP, LinearSigmoid, fuse_
with tempfile.TemporaryDirectory() as folder:
    driver = chip.Driver(pathlib.Path(folder))
    chip.pretend(driver)
    def launches(model, x):
        counts = []
        for _ in range(2):  # the second call finds what the first has decided
            before = driver.launches()
            y = model(x)
            counts.append(driver.launches() - before)
            y.backward(torch.ones_like(y))
            counts.append(driver.launches() - before)
        return counts
    policy = MLP([4, 64, 64, 2], activation="tanh", output_activation="identity")
    print(launches(policy, torch.zeros(256, 4)))
    print(launches(LinearSigmoid(2, 2), torch.zeros(4, 2)))
    fused = nn.Sequential(nn.Linear(2, 8), nn.Sigmoid(), nn.Linear(8, 1), nn.Sigmoid())
    fuse_(fused)
    print(launches(fused, torch.zeros(4, 2)))
    # Wide layers of few rows are torch's own.
    print(launches(LinearSigmoid(512, 512), torch.zeros(4, 512)))
"""


def test_small_eager_calls_launch_kernels(tmp_path):
    script = tmp_path / "eager.py"
    script.write_text(EAGER)
    counts = [json.loads(line) for line in run(script, ROOT / ".ci" / "cache").splitlines()]
    assert counts == [[1, 4, 1, 4], [1, 2, 1, 2], [1, 2, 1, 2], [0, 0, 0, 0]]
