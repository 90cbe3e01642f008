# SPDX-License-Identifier: Apache-2.0
"""`.ci/cuda` where there is no GPU: what it is told, in which order tests run, what is not reached, a rehearsal."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / ".ci" / "cuda"
HALVES = {
    "correctness": ["machine", "correctness", "sanitizer"],
    "speed": ["training", "calibration", "layers", "mlp", "kernelbench"],
}


def run(*arguments, script=SCRIPT, **environment):
    """The script, with this Python as its python3."""
    names = {name: own for name, own in os.environ.items() if name not in ("PARTS", "OUT")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", script, *arguments],
        env=names | {"PATH": path} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def of_pytest(*options, **environment):
    """(exit status, lines) of pytest on the tests that `.ci/cuda` runs."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", *options]
    names = os.environ | environment
    process = subprocess.run(command, cwd=ROOT, env=names, capture_output=True, text=True, timeout=120, check=False)
    return process.returncode, process.stdout.splitlines()


def test_halves_take_less_than_five_minutes():
    script = SCRIPT.read_text()
    limits = re.findall(r"\[(\w+)\]=(\d+)", script[: script.index("declare -A spare")])
    seconds = {name: int(own) for name, own in limits}
    (halves,) = re.findall(r'^halves="(.*)"$', script, re.MULTILINE)
    assert [half.split(",") for half in halves.split()] == list(HALVES.values())
    for parts in HALVES.values():
        # The rest is for what comes before them: imports, and unpacking what was compiled ahead.
        assert sum(seconds[part] for part in parts) <= 285
    assert set(seconds) == {*HALVES["correctness"], *HALVES["speed"], "wide"}


@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (("quick",), {}, "usage: "),
        (("speed", "correctness"), {}, "usage: "),
        (("--dry-run", "--fast"), {}, "usage: "),
        (("speed",), {"PARTS": "layers"}, "usage: "),
        ((), {"PARTS": "layers,tests"}, "PARTS: tests is none of: "),
        ((), {"PARTS": ","}, "PARTS names none of: "),
    ],
)
def test_wrong_arguments(arguments, environment, said):
    process = run(*arguments, **environment)
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith(said)


@pytest.mark.parametrize(
    ("torch", "code", "said"),
    [
        ("raise ImportError('no torch')", 4, r"\S+: no torch; put"),
        ("cuda, __version__ = __import__('cuda'), 2", 3, "torch 2 of"),
    ],
    ids=["torch", "device"],
)
def test_what_is_missing(torch, code, said, tmp_path):
    own = {"torch": torch, "triton": "", "cuda": "is_available = bool"}
    for name, text in own.items():
        (tmp_path / f"{name}.py").write_text(text)
    process = run(PYTHONPATH=str(tmp_path))
    assert (process.returncode, process.stdout) == (code, "")
    assert re.match(f"not run: {said}", process.stderr)


def test_a_python_without_torch_gives_way_to_that_of_the_environment(tmp_path):
    pytest.importorskip("triton")
    for folder, python in ((tmp_path / ".venv/bin", sys.executable), (tmp_path / "bin", f"{sys.executable} -S")):
        folder.mkdir(parents=True)
        (folder / "python3").write_text(f'#!/bin/sh\nexec {python} "$@"\n')
        (folder / "python3").chmod(0o755)
    (tmp_path / ".ci").mkdir()
    script = shutil.copy(SCRIPT, tmp_path / ".ci")
    process = run(script=script, PATH=f"{tmp_path}/bin:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="")
    assert process.returncode == 3
    assert process.stderr.startswith(f"not run: torch {importlib.metadata.version('torch')} of ")


@pytest.mark.slow
def test_a_rehearsal_of_the_machine(tmp_path):
    process = run("--dry-run", PARTS="machine", OUT=str(tmp_path))
    assert process.returncode == 0, process.stdout + process.stderr
    assert re.search(r"^machine +\d+ s  passed$", (tmp_path / "summary.txt").read_text(), re.MULTILINE)
    found = json.loads((tmp_path / "machine.json").read_text())
    assert found["relative_error"] < 1e-6
    assert found["sums"][0]["relative_error"] < 1e-6
    assert set(found["host_us"]) == {"triton launch", "linear_sigmoid", "F.linear", "torch.sigmoid"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "code", "outcome"), [("hardware,core", 1, "errors"), ("core,hardware", 0, "skipped")]
)
def test_what_has_to_be_reached_fails_if_it_is_not(first, code, outcome):
    status, lines = of_pytest("--deadline", "-1", "--first", first, "tests/kernels/test_capture.py")
    assert (status, re.findall(r"\d+ (\w+)", lines[-1])[:1]) == (code, [outcome])


@pytest.mark.slow
def test_what_comes_first_comes_first_in_every_shard():
    options = ("--collect-only", "--first", "hardware,core", "--shard", "1/3", "tests/kernels")
    _, lines = of_pytest(*options, TRITON_INTERPRET="1")
    names = [line for line in lines if line.startswith("tests/")]
    hardware = [name for name in names if "test_capture" in name or "as_compiled" in name]
    assert len(hardware) > 10
    assert names[: len(hardware)] == hardware
