# SPDX-License-Identifier: Apache-2.0
"""The programs of docs/examples run, and learn what they set out to learn."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def same_numbers():
    with torch.random.fork_rng(devices=[]):
        yield


def example(name):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


def test_a_policy_learns_to_balance():
    lengths = example("policy")(rounds=20)
    assert lengths[0] < 40
    assert max(lengths) > 150


def test_a_recommender_learns_through_the_backend():
    torch._dynamo.reset()
    first, last = example("recommender")(inner="aot_eager")  # Inductor takes its time
    assert last < 0.5 * first


def test_a_field_becomes_the_picture():
    assert example("field")(steps=600) > 25


def test_a_sweep_finds_rates_that_learn():
    solved = example("sweep")()
    assert solved[0] == 0
    assert max(solved) > 25


@pytest.mark.more
def test_a_sweep_under_torchrun():
    run = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLES / "sweep.py"))
    done = subprocess.run([sys.executable, *run], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    solved = [int(number) for number in re.findall(r"(\d+) of 50 seeds", done.stdout)]
    assert solved == example("sweep")()
