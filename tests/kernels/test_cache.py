# SPDX-License-Identifier: Apache-2.0
"""Triton's cache of compiled kernels: cold for several processes at once, where it cannot be made, and full."""

import ast
import importlib.util
import json
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
import hashlib, json, os, sys
import torch
from perceptriton.kernels.gpu import aot, layer

slots, total = torch.empty(8, 64, device="meta"), torch.empty(64, device="meta")
(launch,) = aot.launches(layer.sum_slots, slots, total)

def compiled(folder, processes):
    os.environ["TRITON_CACHE_DIR"] = folder
    start, go = os.pipe()
    children = []
    for _ in range(processes):
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
    return [os.read(result, 4096).decode() for result in children]

print([compiled(*job) for job in json.loads(sys.argv[1])])
"""


def run(code, *arguments, **environment):
    command, environment = [sys.executable, "-c", code, *arguments], os.environ | environment
    return subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What processes made of one kernel, a digest of its code or the error, by the cache: eight at once, then one more.

    "no" is a cache that cannot be made, None says why there is no "full" one.
    """
    folder = tmp_path_factory.mktemp("cache")
    (folder / "file").write_text("")
    (folder / "full").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", folder / "full"]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    jobs = {"cold": ("cold", 8), "warm": ("cold", 1), "no": ("file/cache", 1), "full": ("full/cache", 1)}
    if mounted.returncode:
        del jobs["full"]
    try:
        done = run(COMPILE, json.dumps([(str(folder / name), count) for name, count in jobs.values()]))
    finally:
        if not mounted.returncode:
            subprocess.run(["umount", folder / "full"], check=True)
    assert done.returncode == 0, done.stderr
    outcomes = dict(zip(jobs, ast.literal_eval(done.stdout), strict=True))
    return outcomes | {"folder": folder, None: mounted.stderr.strip()}


@pytest.mark.slow
def test_eight_processes_share_a_cold_cache(found):
    assert len(found["cold"]) == 8
    assert len(set(found["cold"])) == 1, found
    assert len(found["cold"][0]) == 64, found
    # What they left is whole: another process takes it, and no half-written file lies about.
    folder = found["folder"] / "cold"
    assert found["warm"] == found["cold"][:1]
    assert len(list(folder.rglob("*.cubin"))) == 1
    assert [path for path in folder.rglob("*") if path.is_file() and "tmp" in path.name] == []


@pytest.mark.slow
def test_a_cache_that_cannot_be_made_is_an_error_that_says_so(found):
    (error,) = found["no"]
    assert error.startswith("NotADirectoryError: ")
    assert str(found["folder"] / "file") in error


@pytest.mark.slow
def test_a_full_cache_is_an_error_that_says_so(found):
    if "full" not in found:
        pytest.skip(f"a small file system cannot be mounted here: {found[None]}")
    (error,) = found["full"]
    assert error.startswith("OSError: "), error
    assert "No space left on device" in error


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
    done = run(code, TRITON_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert (done.returncode, done.stdout) == (0, "True torch.Size([512, 1])\n"), done.stderr
