# SPDX-License-Identifier: Apache-2.0
"""What `perceptriton doctor` prints: what is installed, and which implementation layers take on this machine."""

import importlib.metadata
import os
import platform
import tempfile
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch

from ..kernels import devices, explain
from ..kernels.native import ready
from .lessons.text import columns, fill

__all__ = ["SHAPES", "has_cuda", "report", "triton_cache"]

# (rows, widths of a layer or of a network): the calls that `doctor` explains.
SHAPES = (
    (4, 2, 2),
    (64, 64, 64),
    (128, 784, 128),
    (65536, 16, 16),
    (65536, 64, 64),
    (16384, 256, 256),
    (1024, 1024, 1024),
    (4096, 1024, 1024),
    (8192, 512, 1),
    (4, 2, 10, 10, 10, 1),
    (256, 32, 64, 5),
    (65536, 64, 64, 64, 64),
    (4096, 256, 256, 256, 256),
    (128, 784, 128, 10),
)


def report() -> Iterator[str]:
    """The lines of the report."""
    cuda = has_cuda()
    for name, value in _facts(cuda):
        # A path stays in one piece, to be copied.
        yield f"{name:<20}  {value}" if os.sep in value else fill(value, f"{name:<20}  ", " " * 22)
    device = "cuda" if cuda else "cpu"
    yield "\n" + fill(f"Which implementation fp32 layers and networks take on {device}, and why:") + "\n"
    yield f"{'rows':>5}  {'widths':15}  {'pass':17}  {'runs as':8}  why"
    for rows, *widths in SHAPES:
        shapes = [(n, k) for k, n in pairwise(widths)]
        with warnings.catch_warnings():
            # A device that is too old for the kernels raises a warning; the table says the same.
            warnings.simplefilter("ignore")
            found = explain((rows, widths[0]), shapes if len(shapes) > 1 else shapes[0], device=device)
        passes: dict[tuple[str, str], list[str]] = {}
        for name, plan in found._asdict().items():
            passes.setdefault((plan.impl, plan.reason), []).append(name)
        label = f"{rows:5}  {'-'.join(map(str, widths)):15}"
        for (impl, reason), names in passes.items():
            start = f"{label:22}  {'all' if len(passes) == 1 else '/'.join(names):17}  {impl:8}  "
            if columns() < 80:
                yield f"{start.rstrip()}\n{fill(reason, ' ' * 24, ' ' * 24)}"
            else:
                yield fill(reason, start, " " * len(start))
            label = ""


def has_cuda() -> bool:
    """Whether torch finds a CUDA device."""
    # torch warns of a driver that is too old; here the answer "no" is enough.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.cuda.is_available()


def _facts(cuda: bool) -> list[tuple[str, str]]:
    facts = [
        ("perceptriton", _version("perceptriton")),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        ("torch", torch.__version__),
        ("triton", _version("triton")),
        ("numpy", _version("numpy")),
        ("numba", _numba()),
        ("CPU", f"{devices.cpu_kind() or 'unknown vendor'}, threads of torch: {torch.get_num_threads()}"),
    ]
    for index in range(torch.cuda.device_count() if cuda else 0):
        properties = torch.cuda.get_device_properties(index)
        capability = f"compute capability {properties.major}.{properties.minor}"
        size = f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
        facts.append((f"cuda:{index}", f"{properties.name}, {capability}, {size}"))
    if not cuda:
        facts.append(("cuda", "no device" if torch.version.cuda else "no device, and torch is built without CUDA"))
    # Triton reads this variable when it is imported, which a report must not cause.
    interpreted = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "on", "true")
    facts.append(("triton's interpreter", 'on: impl="triton" takes CPU tensors' if interpreted else "off"))
    if devices.has_triton():
        facts.append(("triton's cache", triton_cache()))
        if cuda:
            facts.append(("triton's driver", devices.triton_refusal() or "starts"))
    return facts


def triton_cache() -> str:
    """The folder for compiled kernels, and what keeps triton from writing there. Leaves nothing behind."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or os.path.join(home, ".triton", "cache")).absolute()
    try:
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing) as probe:
            # A megabyte, because a disk that counts as full may still take a few bytes.
            probe.write(bytes(1 << 20))
            probe.flush()
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror}): new kernels will fail"
    return f"{folder}, writable"


def _numba() -> str:
    if ready.refusal():
        return "not installed: small networks train slowly; pip install 'perceptriton[native]'"
    return _version("numba")


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
