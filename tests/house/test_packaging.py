# SPDX-License-Identifier: Apache-2.0
"""The package as others get it: what the wheel holds, and what importing it does, from outside the repository."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from perceptriton.kernels.registration import OVERLOAD

pytestmark = pytest.mark.more
ROOT = Path(__file__).parents[2]
PACKAGES = ("kernels", "mlp")
VERSION = re.search(r'version="(.*)"', (ROOT / "setup.py").read_text())[1]
DATA = ("py.typed", "_front/py.typed", "tuned/*.json", "lessons/tables/*.json")


def shipped():
    """Every path that a wheel has to hold, metadata aside."""
    return {
        f"perceptriton/{path.relative_to(ROOT).as_posix().removeprefix('mlp/_front/')}"
        for package in PACKAGES
        for pattern in ("**/*.py", *DATA)
        for path in (ROOT / package).glob(pattern)
    }


def python(*arguments, path=None):
    """Runs this Python from / with only `path` on PYTHONPATH; returns what it printed."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *arguments], cwd="/", env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def python_json(code, path=None, *flags):
    """The value that `code` leaves in `result`."""
    code = f"{code}\nimport json\nprint(json.dumps(result))"
    return json.loads(python(*flags, "-c", code, path=path).splitlines()[-1])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of this tree, built from a copy: building leaves folders behind, and picks up those of an older build."""
    (needed,) = re.findall(r'^requires = \["setuptools>=(\d+)"\]$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    for tool, least in (("pip", 0), ("setuptools", int(needed))):
        # By its metadata: looking for its module would wake setuptools' import hook, which warns in a busy process.
        try:
            found = importlib.metadata.version(tool)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{tool} is not installed: no wheel can be built")
        if int(found.partition(".")[0]) < least:
            pytest.skip(f"setuptools is {found}; pyproject.toml asks for {least} or newer")
    tmp = tmp_path_factory.mktemp("wheel")
    ignore = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp / "source", ignore=ignore)
    build = ("wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", str(tmp))
    python("-m", "pip", *build, str(tmp / "source"))
    (built,) = tmp.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel):
    """A folder that holds the package, installed from the wheel."""
    site = wheel.parent / "site"
    python("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    return site


# --- what is in it -----------------------------------------------------------------------------------------


def test_sources_name_their_license():
    license = re.search(r'license="(.*)"', (ROOT / "setup.py").read_text())[1]
    folders = (ROOT / name for name in (".ci", "benches", "docs", "kernels", "mlp", "tests"))
    sources = [ROOT / "setup.py", *(path for folder in folders for path in folder.rglob("*.py"))]
    line = f"# SPDX-License-Identifier: {license}\n"
    assert len(sources) > 200
    assert [path for path in sources if not path.read_text().startswith(line)] == []


def test_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (n for n in archive.namelist() if n.endswith(".dist-info/entry_points.txt"))
        assert "perceptriton = perceptriton.mlp.__main__:main" in archive.read(entry_points).decode()
    assert names == shipped()
    # The list of what has to be there is not empty by mistake.
    for kind in (
        "kernels/py.typed",
        "mlp/py.typed",
        "py.typed",
        "__init__.py",
        "__main__.py",
        "kernels/plan/layer.py",
        "kernels/tuned/cpu.json",
        "mlp/layers.py",
    ):
        assert f"perceptriton/{kind}" in names


def test_requirements_of_users_hold_no_test_tools(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert sorted(line.split()[1].partition(">")[0].rstrip(";") for line in required) == ["numpy", "torch", "triton"]


# --- where it works ----------------------------------------------------------------------------------------

# What importing the package does, seen by a process that does nothing else before.
IMPORT = """
import sys, time
import torch
before = set(sys.modules)
def probe(*_):
    raise RuntimeError("importing the package asks for a driver")
asked = {name: getattr(torch.cuda, name) for name in ("is_available", "device_count", "get_device_properties")}
vars(torch.cuda).update(dict.fromkeys(asked, probe))
began = time.process_time()  # not the wall's: other processes of this machine do not count
import perceptriton.kernels, perceptriton.mlp
light = {
    "seconds": time.process_time() - began,
    "new": sorted({name.partition(".")[0] for name in set(sys.modules) - before}),
    "compiler": sorted({"torch._dynamo", "torch._inductor", "perceptriton.mlp.backend"} & set(sys.modules)),
    "cuda": torch.cuda.is_initialized(),
    "tables": perceptriton.kernels.tables.read_table.cache_info().currsize,
}
vars(torch.cuda).update(asked)
"""
USE = """
import importlib.util
import os
import torch
import perceptriton.kernels, perceptriton.mlp
from perceptriton.kernels import Device, explain
from perceptriton.mlp import MLP
model = MLP([3, 300, 2])
for rows in (1, 700):  # a small layer and a large one take different paths
    y = model(torch.ones(rows, 3))
    y.square().sum().backward()
    gradients = [float(p.grad.abs().sum()) for p in model.parameters()]
    model.zero_grad()
chip = Device("cuda", arch=90, units=132, triton=importlib.util.find_spec("triton") is not None)
result = {
    "kernels": os.path.realpath(perceptriton.kernels.__file__),
    "mlp": os.path.realpath(perceptriton.mlp.__file__),
    "shape": list(y.shape),
    "gradients": gradients,
    "on a chip": [plan.impl for plan in explain((64, 16), (16, 16), device=chip)],
    "taken names": [getattr(importlib.util.find_spec(name), "origin", None) for name in ("kernels", "mlp", "tests")],
}
"""


def assert_used(result, folder):
    """`result` of USE is right, from the copy of the package in `folder`."""
    for package in PACKAGES:
        found = Path(result[package])
        assert found.name == "__init__.py"
        assert found.parent == folder / package, "another copy was imported"
    assert result["shape"] == [700, 2]
    assert len(result["gradients"]) == 4
    assert min(result["gradients"]) > 0
    for origin in result["taken names"]:
        # An environment inside the checkout may hold the well-known package `kernels`.
        assert origin is None or Path(origin).parent.parent != folder, "a top-level name that is not ours to take"


def test_installed_package_imports_quickly_and_works_from_anywhere(installed):
    for _ in range(3):  # the best of three, for machines that do other things too
        result = python_json(f"{IMPORT}{USE}result |= light", installed, "-W", "error")
        assert "perceptriton" in result["new"]
        assert {"triton", "matplotlib", "tqdm", "sklearn", "numba", "llvmlite"} & set(result["new"]) == set()
        assert not result["cuda"]
        assert result["compiler"] == []
        assert result["tables"] == 0, "what is damaged is found by those who ask for a plan"
        if result["seconds"] < 0.3:
            break
    else:
        pytest.fail(f"importing takes {result['seconds']:.2f} s beyond torch, three times over")
    assert_used(result, installed / "perceptriton")
    assert result["on a chip"] == ["rows", "rows"]


def test_editable_install_works_from_anywhere():
    try:
        about = json.loads(importlib.metadata.distribution("perceptriton").read_text("direct_url.json") or "{}")
    except importlib.metadata.PackageNotFoundError:
        about = {}
    if not about.get("dir_info", {}).get("editable") or about["url"] != ROOT.as_uri():
        pytest.skip("this environment holds no editable install of this repository")
    assert_used(python_json(USE), ROOT)


def test_links_are_the_package_without_an_install(tmp_path):
    subprocess.run(["bash", ROOT / ".ci" / "link", tmp_path], check=True)
    assert_used(python_json(USE, tmp_path), ROOT)


def test_works_without_triton(installed):
    # None in sys.modules: `import triton` raises and find_spec finds nothing, as if it were not installed.
    result = python_json(f"import sys\nsys.modules['triton'] = None\n{USE}", installed)
    assert_used(result, installed / "perceptriton")
    assert result["on a chip"] == ["aten", "aten"]


def test_command_line_of_the_installed_package(installed):
    assert "torch" in python(str(installed / "bin" / "perceptriton"), "doctor", path=installed)
    for command in ([str(installed / "bin" / "perceptriton")], ["-m", "perceptriton"], ["-m", "perceptriton.mlp"]):
        assert python(*command, "--version", path=installed) == f"perceptriton {VERSION}\n"


BACKEND = """
import torch
from torch._dynamo.backends.registry import lookup_backend
function = lookup_backend("perceptriton")
model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Sigmoid())
x = torch.ones(4, 3)
compiled = torch.compile(model, backend="perceptriton", options={"backend": "eager"})
result = {
    "names": torch._dynamo.list_backends(),
    "module": function.__module__,
    "close": torch.allclose(compiled(x), model(x)),
}
"""


def test_torch_compile_knows_the_backend_by_its_name(installed):
    result = python_json(BACKEND, installed)
    assert "perceptriton" in result["names"]
    assert result["module"] == "perceptriton.mlp.backend"
    assert result["close"]


# The copy comes first, where the package that it was copied from cannot be imported, and then both.
HUB = """
import os, pathlib, sys
os.environ["TRITON_INTERPRET"] = "1"
sys.modules["perceptriton"] = None
import torch
import kernels
from torch._dynamo.backends.common import aot_autograd
copy = kernels.get_local_kernel(pathlib.Path({folder!r}))
tensors = [torch.randn(6, 5), torch.randn(3, 5), torch.randn(3)]
dy = torch.randn(6, 3)

def run(linear_act):
    inputs = [t.clone().requires_grad_() for t in tensors]
    y = linear_act(*inputs, "tanh", impl="triton")
    return [t.tolist() for t in (y, *torch.autograd.grad(y, inputs, dy))]

def traced(linear_act):
    "The names of our ops in the graphs of both directions, and what they compute."
    names = set()
    def note(graph, _):
        calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
        names.update(name for name in calls if "linear_act" in name)
        return graph
    torch._dynamo.reset()
    results = run(torch.compile(linear_act, fullgraph=True, backend=aot_autograd(fw_compiler=note)))
    return sorted(names), results

alone = run(copy.linear_act)
del sys.modules["perceptriton"]
import perceptriton.mlp
inputs = [t.clone().requires_grad_() for t in tensors]
y = torch.tanh(torch.nn.functional.linear(*inputs))
result = {{
    "id": copy.__name__,
    "file": copy.__file__,
    "installed": perceptriton.mlp.__file__,
    "torch": [t.tolist() for t in (y, *torch.autograd.grad(y, inputs, dy))],
    "alone": alone,
    "beside": {{
        name: [run(package.linear_act), *traced(package.linear_act)]
        for name, package in (("perceptriton", perceptriton.mlp), (copy.__name__, copy))
    }},
}}
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_hub_export_of_the_installed_package_runs_beside_it(installed, tmp_path):
    pytest.importorskip("kernels._rust", exc_type=ImportError, reason="the package kernels is not installed")
    folder = tmp_path / "repository"
    assert "_perceptriton_cpu_" in python("-m", "perceptriton.mlp", "export-hub", str(folder), path=installed)
    result = python_json(HUB.format(folder=str(folder)), installed)
    assert Path(result["file"]).is_relative_to(folder)
    assert Path(result["installed"]).is_relative_to(installed)
    assert set(result["beside"]) == {"perceptriton", result["id"]}
    for namespace, (eager, names, compiled) in result["beside"].items():
        assert names == [f"{namespace}.{op}.{OVERLOAD}" for op in ("linear_act", "linear_act_backward")]
        assert eager == compiled == result["alone"]
    for actual, expected in zip(result["alone"], result["torch"], strict=True):
        torch.testing.assert_close(torch.tensor(actual), torch.tensor(expected))


def test_a_folder_of_the_checkout_is_no_package_of_its_own():
    """`import kernels` in the root finds ours in the place of another package of that name."""
    command = [sys.executable, "-c", "import kernels"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert "ImportError: this folder is a part of perceptriton, not the package kernels" in run.stderr
