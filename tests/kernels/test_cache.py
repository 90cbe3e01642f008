"""Triton's cache of compiled kernels: cold for several processes at once, where it cannot be made, and full."""

import ast
import importlib.util
import os
import subprocess
import sys

import cases
import pytest

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
    pytest.mark.skipif(cases.kernel_device() == "cpu", reason="the interpreter compiles nothing"),
]

# One process imports everything and forks before it compiles: the others would only repeat the imports.
COMPILE = """
import hashlib, os, sys
import torch
from perceptriton.kernels.gpu import aot, layer

slots, total = torch.empty(8, 64, device="meta"), torch.empty(64, device="meta")
(launch,) = aot.launches(layer.sum_slots, slots, total)
start, go = os.pipe()
children = []
for _ in range(int(sys.argv[1])):
    result, write = os.pipe()
    if not os.fork():
        os.close(go)
        os.read(start, 1)
        try:
            outcome = hashlib.sha256(aot.compiled(90, launch).asm["cubin"]).hexdigest()
        except BaseException as error:
            outcome = f"{type(error).__name__}: {error}"
        os.write(write, outcome.encode())
        os._exit(0)
    os.close(write)
    children.append(result)
os.close(start)
os.close(go)
print([os.read(result, 4096).decode() for result in children])
"""


def run(code, folder, *arguments):
    environment = os.environ | {"TRITON_CACHE_DIR": str(folder)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=300)


def compiled(folder, processes=1):
    """What each of so many processes made of one kernel at once: a digest of its code, or the error."""
    done = run(COMPILE, folder, str(processes))
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stdout)


@pytest.fixture(scope="module")
def digests(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache") / "cold"
    return folder, compiled(folder, 8)


@pytest.mark.slow
def test_eight_processes_share_a_cold_cache(digests):
    folder, found = digests
    assert len(found) == 8
    assert len(set(found)) == 1, found
    assert len(found[0]) == 64, found
    # What they left is whole: another process takes it, and no half-written file lies about.
    cubins = list(folder.rglob("*.cubin"))
    assert len(cubins) == 1
    assert [path for path in folder.rglob("*") if path.is_file() and "tmp" in path.name] == []
    assert compiled(folder) == found[:1]
    assert list(folder.rglob("*.cubin")) == cubins


@pytest.mark.slow
def test_a_cache_that_cannot_be_made_is_an_error_that_says_so(tmp_path):
    (tmp_path / "file").write_text("")
    (found,) = compiled(tmp_path / "file" / "cache")
    assert found.startswith("NotADirectoryError: ")
    assert str(tmp_path / "file") in found


@pytest.mark.slow
def test_a_full_cache_is_an_error_that_says_so(tmp_path):
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", tmp_path], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a small file system cannot be mounted here: {mounted.stderr.strip()}")
    try:
        (found,) = compiled(tmp_path / "cache")
    finally:
        subprocess.run(["umount", tmp_path], check=True)
    assert found.startswith("OSError: "), found
    assert "No space left on device" in found


@pytest.mark.slow
def test_the_cpu_does_without_a_cache(tmp_path):
    (tmp_path / "file").write_text("")
    code = """
import torch
from perceptriton.mlp import MLP, fit
torch.manual_seed(0)
model, x = MLP((8, 300, 1)), torch.rand(512, 8)
history = fit(model, x, x[:, :1].round(), criterion=torch.nn.BCELoss(),
              optimizer=torch.optim.SGD(model.parameters(), lr=0.5), steps=3, log_every=1)
print(history.loss.isfinite().all().item(), model(x).shape)
"""
    done = run(code, tmp_path / "file" / "cache")
    assert (done.returncode, done.stdout) == (0, "True torch.Size([512, 1])\n"), done.stderr
