# SPDX-License-Identifier: Apache-2.0
"""The package `perceptriton` itself, in mlp/_front: its names, its version, and what editors are told of them."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from perceptriton import mlp

ROOT = Path(__file__).parents[2]
FUNCTIONAL = {
    "layer": {"linear_act", "linear_sigmoid"},
    "loss": {"linear_sigmoid_bce", "mlp_sigmoid_bce"},
    "network": {"mlp_act"},
}
ESTIMATORS = {"FusedMLPClassifier", "FusedMLPRegressor"}


@pytest.fixture(scope="module")
def links(tmp_path_factory):
    """A folder with the package in links, as `make test-setup` lays it into the environment."""
    folder = tmp_path_factory.mktemp("links")
    subprocess.run(["bash", ROOT / ".ci" / "link", folder], check=True)
    return folder


def result(code, links):
    """The value that `code` leaves in `result`."""
    code = f"{code}\nimport json\nprint(json.dumps(result))"
    environment = os.environ | {"PYTHONPATH": str(links)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=links, env=environment, check=True, timeout=120, stdout=subprocess.PIPE
    )
    return json.loads(run.stdout)


def test_importing_it_imports_nothing_else(links):
    code = "import sys, perceptriton\nresult = [perceptriton.__version__, sorted(sys.modules)]"
    version, modules = result(code, links)
    assert version == re.search(r'version="(.*)"', (ROOT / "setup.py").read_text())[1]
    assert not {"torch", "numpy", "perceptriton.mlp"} & set(modules)


NAMES = """
import perceptriton as p
from perceptriton import *
from perceptriton import MLP as same
result = {
    "same": [name for name in p.mlp.__all__ if getattr(p, name) is getattr(p.mlp, name) is globals()[name]],
    "listed": dir(p),
    "explain": p.explain is p.kernels.explain is explain,
    "others": [hasattr(p, name) for name in ("kernels", "capturing", "no_such_name", "__wrapped__")],
}
"""


@pytest.mark.slow
def test_its_names_are_those_of_mlp(links):
    found = result(NAMES, links)
    assert found["same"] == mlp.__all__
    assert {*mlp.__all__, "explain", "kernels", "mlp", "__version__"} <= set(found["listed"])
    assert found["others"] == [True, False, False, False]
    assert found["explain"]


# What somebody writes who uses the package, with the types that an editor shows.
USER = """
import perceptriton
from perceptriton import Ensemble, fit
from perceptriton.mlp import lessons
from perceptriton.mlp.estimator import FusedMLPClassifier

reveal_type(perceptriton.MLP([2, 1]))  # MLP
reveal_type(Ensemble(2, [2, 1]).member(0))  # MLP
reveal_type(fit)  # (model: Module, x: Tensor, .*) -> History
reveal_type(perceptriton.kernels.explain((1, 2), (3, 2)))  # Explanation
reveal_type(lessons.xor().matches)  # bool
reveal_type(FusedMLPClassifier().learning_rate)  # float
perceptriton.no_such_name
"""


@pytest.mark.slow
def test_type_checkers_see_it(links, tmp_path):
    pytest.importorskip("basedpyright")
    (tmp_path / "user.py").write_text(USER)
    environment = {"venvPath": str(Path(sys.prefix).parent), "venv": Path(sys.prefix).name}
    settings = {"include": [".", str(links / "perceptriton" / "*.py")], "extraPaths": [str(links)], **environment}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings | {"typeCheckingMode": "standard"}))
    command = [sys.executable, "-m", "basedpyright", "--outputjson"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    found = json.loads(run.stdout)
    said = [(told["severity"], told["message"]) for told in found["generalDiagnostics"]]
    assert found["summary"]["filesAnalyzed"] == 3
    (error,) = (message for severity, message in said if severity != "information")
    assert error == '"no_such_name" is not a known attribute of module "perceptriton"'
    types = [re.escape(kind).replace(r"\.\*", ".*") for kind in re.findall(r"  # (.*)", USER)]
    for kind, message in zip(types, (told for severity, told in said if severity == "information"), strict=True):
        assert re.fullmatch(f'Type of ".*" is "{kind}"', message), message


@pytest.mark.more
def test_mypy_sees_it(links, tmp_path):
    pytest.importorskip("mypy", reason="mypy is not installed")
    (tmp_path / "user.py").write_text(USER)
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--config-file=",
        "--follow-imports=silent",
        "--no-error-summary",
        "user.py",
    ]
    environment = os.environ | {"MYPYPATH": str(links)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    *types, error = run.stdout.splitlines()
    for kind, message in zip(re.findall(r"  # (.*)", USER), types, strict=True):
        assert re.search(rf"note: Revealed type is .*\b{kind.rpartition(' ')[2]}\b", message), message
    assert error.endswith('error: Module has no attribute "no_such_name"  [attr-defined]')


def test_docstrings_name_every_argument():
    # As they stand in the sources, since hovers run nothing that would put them together.
    def nodes(file):
        return {node.name: node for node in ast.parse((ROOT / "mlp" / file).read_text()).body if hasattr(node, "name")}

    estimators = nodes("estimator/base.py") | nodes("estimator/classifier.py") | nodes("estimator/regressor.py")
    fields = [n.target.id for n in estimators["FusedMLP"].body if isinstance(n, ast.AnnAssign)]
    cases = [(estimators[name], [f for f in fields if not f.startswith("_")]) for name in ESTIMATORS]
    for file, names in FUNCTIONAL.items():
        functions = [nodes(f"functional/{file}.py")[name] for name in names]
        cases += [(f, [one.arg for one in f.args.args + f.args.kwonlyargs]) for f in functions]
    for node, arguments in cases:
        text = ast.get_docstring(node) or ""
        assert len(arguments) > 3
        assert [one for one in arguments if not re.search(rf"\b{one}\b", text)] == [], node.name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["perceptriton.MLP", "perceptriton.mlp_sigmoid_bce", "FusedMLPRegressor"])
def test_editors_show_docstrings(name, links):
    jedi = pytest.importorskip("jedi", reason="jedi is not installed")
    code = f"import perceptriton\nfrom perceptriton.mlp.estimator import FusedMLPRegressor\n{name}"
    project = jedi.Project(links, added_sys_path=[str(links)])
    (found,) = jedi.Script(code, project=project).help(3, len(name) - 1)
    text = found.docstring(raw=True)
    assert len(text.splitlines()) > 3, text
