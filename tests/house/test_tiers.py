# SPDX-License-Identifier: Apache-2.0
"""Every test is run by a target of CI. Markers, which pyproject.toml lists, say which; recipes of the Makefile ask."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "tests").glob("**/test_*.py"))
MARKERS = set(re.findall(r'^    "(\w+): .*",$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE))
RULES = dict(re.findall(r"^([a-z-]+):.*\n((?:\t.*\n)*)", (ROOT / "Makefile").read_text(), re.MULTILINE))


def reached(*targets):
    """The targets, and those that their recipes name."""
    found = []
    for target in targets:
        named = re.findall(r"call parts,([a-z -]+)\)|\$\(MAKE\) --no-print-directory ([a-z-]+);", RULES[target])
        found += [target, *reached(*" ".join(a or b for a, b in named).split())]
    return found


def tiers(*targets):
    """(whether under the interpreter, what -m asks for, the folders) of each run of tests/ that the targets make."""
    lines = [line for target in reached(*targets) for line in RULES[target].splitlines() if "$(PYTEST)" in line]
    runs = [re.fullmatch(r".*\$\(PYTEST\).* -m ('[^']+'|\w+)((?: tests/\w+)*)\)", line) for line in lines]
    return [
        ("TRITON_INTERPRET=1" in run[0], run[1].strip("'"), [ROOT / folder for folder in run[2].split() or ["tests"]])
        for run in runs
        if run is not None
    ]


def marks_in(node):
    return {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "pytest.mark"}


@functools.cache
def cases_in(source):
    """(name, markers) of every test, and of its cases with a marker of their own."""
    tree = ast.parse(source)
    shared = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark":
            shared |= marks_in(node.value)
    parameters = [marks_in(n.value) for n in ast.walk(tree) if isinstance(n, ast.keyword) and n.arg == "marks"]
    if any(isinstance(n, ast.Call) and ast.unparse(n.func) == "core" for n in ast.walk(tree)):
        parameters += [{"core"}, {"more"}]
    found = []
    for function in (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test")):
        own = {ast.unparse(d.func if isinstance(d, ast.Call) else d) for d in function.decorator_list}
        marks = {mark for mark in MARKERS if f"pytest.mark.{mark}" in own or mark in shared}
        found += [(function.name, marks | (more & MARKERS)) for more in [set(), *parameters]]
    return found


def unreached(path, source, runs):
    """Tests that none of the runs asks for where they can run."""
    kernels = "\n    pytest.skip(NO_KERNELS, allow_module_level=True)" in source
    found = []
    for name, marks in cases_in(source):
        names = {mark: mark in marks for mark in MARKERS}
        interpreted = bool(marks & {"interpreter", "tilelens"})
        asking = [run for run in runs if eval(run[1], {"__builtins__": {}}, names)]
        runs_it = any(where == interpreted and {*folders} & {*path.parents} for where, _, folders in asking)
        if not runs_it or kernels > interpreted:
            found.append((name, marks))
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_ci_runs_every_test(path):
    assert unreached(path, path.read_text(), tiers("test", "test-more")) == []


def test_the_fast_loop_reaches_every_part():
    runs = tiers("check")
    assert len(runs) == 4
    missed = {
        path.stem for path in FILES if len(unreached(path, path.read_text(), runs)) == len(cases_in(path.read_text()))
    }
    # Compilers, solvers and other processes take too long.
    assert {name for name in missed if not name.endswith(("compile", "compiled"))} == {
        "test_tilelens",
        "test_distributed",
        "test_examples",
        "test_cache",
        "test_cuda_cache",
        "test_host",
        "test_packaging",
        "test_controls",
        "test_faults",
        "test_threads",
        "test_traffic",
    }


def test_a_test_that_nobody_runs_is_found():
    kernels = "pytestmark = pytest.mark.interpreter"
    for lines, missing in (
        ("", []),
        (kernels, []),
        ("@pytest.mark.more", [{"more"}]),
        (f"{kernels}\n@pytest.mark.more", [{"interpreter", "more"}]),
        (f"{kernels}\n@pytest.mark.f([pytest.param(1, marks=pytest.mark.long)])", [{"interpreter", "long"}]),
        ("if True:\n    pytest.skip(NO_KERNELS, allow_module_level=True)", [set()]),
    ):
        source = f"{lines}\ndef test_x():\n    pass\n"
        assert unreached(ROOT / "tests" / "kernels" / "test_x.py", source, tiers("test")) == [
            ("test_x", marks) for marks in missing
        ]
    assert unreached(ROOT / "elsewhere" / "test_x.py", "def test_x():\n    pass\n", tiers("test")) != []


def test_every_marker_is_used_and_asked_for():
    used = set().union(*(marks for path in FILES for _, marks in cases_in(path.read_text())))
    recipes = (ROOT / "Makefile").read_text() + (ROOT / ".ci" / "cuda").read_text()
    asked = {
        name
        for expression in re.findall(r" (?:-m|--first) ('[^']+'|[\w,]+)", recipes)
        for name in re.findall(r"\w+", expression)
    }
    assert used == MARKERS
    assert asked >= MARKERS


def test_jobs_of_ci_name_every_part():
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (parts,) = re.findall(r"call parts,([a-z -]+)\)", RULES["test-more"])
    assert re.findall(r"^ +target: \[(.*)\]$", workflow, re.MULTILINE) == [", ".join(["check", "test", *parts.split()])]
