# SPDX-License-Identifier: Apache-2.0
"""What names a compilation, and the table that keeps what came out of it: see compiling.py."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import compiling
import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed: there is nothing to compile")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("the interpreter replaces the compiler in this process; run without it", allow_module_level=True)

from perceptriton.kernels.gpu import aot, functions  # noqa: E402

pytestmark = pytest.mark.compiles

SOURCE = '''
import math

import triton
import triton.language as tl

SCALE = tl.constexpr(3)
FACTOR = tl.constexpr(2)
UNREAD = tl.constexpr(1)


@triton.jit
def inner(z, SHIFT: tl.constexpr = SCALE):
    # What is two calls away.
    return z * 2.0 + SHIFT


@triton.jit
def act(z):
    return inner(z)


@triton.jit
def helper(z):
    return z - math.pi


@triton.jit
def kernel(x_ptr, size, ACT: tl.constexpr, BLOCK: tl.constexpr):
    """One block."""
    offsets = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < size)
    tl.store(x_ptr + offsets, ACT(helper(x)) * FACTOR, mask=offsets < size)
'''


def load(path, source=SOURCE):
    """The module of a source text, written to a path of its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    return load(tmp_path_factory.mktemp("kernels") / "k.py")


OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}


def launch(module, block=64, size=48, options=None, dtype=torch.float32):
    x = torch.empty(64, dtype=dtype, device="meta")
    arguments = {"x_ptr": x, "size": size, "ACT": module.act, "BLOCK": block}
    return aot.Launch(module.kernel, arguments, OPTIONS | (options or {}))


# --- what an identity hangs on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("z * 2.0", "z * 4.0"),
        ("return inner(z)", "return -inner(z)"),
        ("z - math.pi", "z + math.pi"),
        ("offsets < size)\n    tl", "offsets <= size)\n    tl"),
        ("FACTOR = tl.constexpr(2)", "FACTOR = tl.constexpr(4)"),
        ("SCALE = tl.constexpr(3)", "SCALE = tl.constexpr(5)"),
        ("SHIFT: tl.constexpr = SCALE", "SHIFT: tl.constexpr = 7"),
        ("@triton.jit\ndef act", "@triton.jit(noinline=True)\ndef act"),
        ("math.pi", "math.tau"),
    ],
)
def test_another_code_has_another_identity(tmp_path, old, new):
    assert old in SOURCE
    before, after = load(tmp_path / "a" / "k.py"), load(tmp_path / "b" / "k.py", SOURCE.replace(old, new, 1))
    assert aot.identity(90, launch(before)) != aot.identity(90, launch(after))


def test_a_default_is_of_the_day_the_function_was_defined(tmp_path):
    later = SOURCE.replace("@triton.jit\ndef act", "SCALE = tl.constexpr(5)\n\n\n@triton.jit\ndef act")
    earlier = later.replace("SCALE = tl.constexpr(3)", "SCALE = tl.constexpr(4)")
    assert aot.identity(90, launch(load(tmp_path / "a.py", later))) != aot.identity(
        90, launch(load(tmp_path / "b.py", earlier))
    )


def test_values_that_a_module_holds_count(tmp_path, monkeypatch):
    source = SOURCE.replace("import math\n", "import constants\n").replace("math.pi", "constants.PI")
    found = []
    for value in (3, 4):
        constants = load(tmp_path / f"{value}.py", f"import triton.language as tl\nPI = tl.constexpr({value})")
        monkeypatch.setitem(sys.modules, "constants", constants)
        found.append(aot.identity(90, launch(load(tmp_path / f"kernel{value}.py", source))))
    assert found[0] != found[1]


@pytest.mark.parametrize(
    "change",
    [
        {"block": 32},
        {"size": 47},  # no multiple of 16
        {"size": 1},  # a constant
        {"dtype": torch.bfloat16},
        {"options": {"num_warps": 8}},
        {"options": {"num_stages": 3}},
        {"options": {"maxnreg": 64}},
        {"options": {"enable_fp_fusion": False}},
    ],
    ids=str,
)
def test_another_launch_has_another_identity(module, change):
    assert aot.identity(90, launch(module)) != aot.identity(90, launch(module, **change))


def test_another_compiler_has_another_identity(module, monkeypatch):
    own = launch(module)
    found = [aot.identity(arch, own) for arch in (80, 90, 100)]
    with monkeypatch.context() as patch:
        patch.setattr(aot, "get_ptxas_version", lambda arch: "release 99.9")
        found.append(aot.identity(90, own))
    with monkeypatch.context() as patch:
        patch.setattr(aot.triton, "__version__", "99.9")
        found.append(aot.identity(90, own))
    assert len(set(found)) == len(found)
    assert aot.identity(90, own) == found[1]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("", ""),  # on another path
        ("import math", "import math\n\n\n"),  # further down
        ("    # What is two calls away.\n", ""),
        ("    # What is two calls away.\n", '    """Two calls away."""\n'),
        ('"""One block."""', '"""A block\n\n    of two paragraphs."""'),
        ("return inner(z)", "return (\n        inner( z )  # as before\n    )"),
        ("UNREAD = tl.constexpr(1)", "UNREAD = tl.constexpr(2)"),
    ],
)
def test_the_same_code_has_the_same_identity(tmp_path, old, new):
    before, after = load(tmp_path / "a" / "k.py"), load(tmp_path / "b" / "c" / "k.py", SOURCE.replace(old, new))
    assert aot.identity(90, launch(before)) == aot.identity(90, launch(after))
    if new == "import math\n\n\n":
        assert before.kernel.cache_key != after.kernel.cache_key, "triton's own key would do"


def test_sizes_that_compile_alike_and_the_order_of_words_do_not_count(module):
    own = launch(module)
    turned = aot.Launch(own.kernel, *(dict(reversed(words.items())) for words in (own.arguments, own.options)))
    assert aot.identity(90, own) == aot.identity(90, turned) == aot.identity(90, launch(module, size=32))


def test_a_value_without_a_text_of_its_own_is_refused(module):
    with pytest.raises(TypeError, match="has no text of its own"):
        aot.identity(90, launch(module, block=object()))


def shipped():
    """A launch of each kernel that the suites compile, by the kernel's name."""
    import test_compile
    import test_mlp_compile
    import test_training_compile
    import test_wide_compile

    found = {}
    for suite in (test_compile, test_mlp_compile, test_training_compile, test_wide_compile):
        for case in suite.CASES.values():
            for _, own in suite._launches(case):
                found.setdefault(own.kernel.__name__, own)
    return found


def functions_of_the_package():
    import perceptriton.kernels.gpu as package
    from perceptriton.kernels.gpu import layer, network, train, wide  # noqa: F401

    modules = [value for value in vars(package).values() if type(value) is type(package)]
    return {
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, triton.runtime.JITFunction) and value.fn.__module__ == module.__name__
    }


@pytest.mark.more
def test_an_identity_hangs_on_the_functions_that_triton_s_own_key_hangs_on():
    functions, launches = functions_of_the_package(), shipped()
    assert len(functions) > 20

    def keys(kind):
        for function in functions:
            function.hash = None
        aot._code.cache_clear()
        return {name: kind(own) for name, own in launches.items()}

    def identity(own):
        return aot.identity(90, own)

    def triton_s(own):
        return aot.source(own).hash()

    before = keys(identity), keys(triton_s)
    hanging = set()
    for function in functions:
        source = function.src
        function._unsafe_update_src(source.rstrip() + "\n    pass\n")
        try:
            after = keys(identity), keys(triton_s)
        finally:
            function._unsafe_update_src(source)
        own, others = (
            {name for name in launches if old[name] != new[name]} for old, new in zip(before, after, strict=True)
        )
        assert own == others, function.__name__
        hanging |= {function.__name__} if own else set()
    assert keys(identity) == before[0]
    assert hanging >= {*launches, "tanh"}


def test_a_change_of_an_activation_changes_what_takes_it(tmp_path):
    own = shipped()["linear_act_fwd_rows_kernel"]
    (name,) = (name for name, value in own.arguments.items() if value is functions.tanh)
    text = (compiling.TABLES.parents[1] / "kernels" / "gpu" / "functions.py").read_text()
    copy = load(tmp_path / "copy.py", "# moved\n" + text)
    changed = load(tmp_path / "changed.py", text.replace("a < 0.125", "a < 0.25"))
    as_is, moved, other = (
        aot.identity(90, aot.Launch(own.kernel, own.arguments | {name: module.tanh}, own.options))
        for module in (functions, copy, changed)
    )
    assert as_is == moved != other


# --- the table -------------------------------------------------------------------------------------------------------


class Compilers:
    """In this process, and counted. To disassemble takes a moment: what came out once is remembered."""

    made = {}  # noqa: RUF012

    def __init__(self):
        self.jobs = 0

    def starmap(self, function, jobs, chunksize):
        self.jobs += len(jobs)
        keys = [(case, index, *compiling.FINDINGS) for _, case, index in jobs]
        for key, job in zip(keys, jobs, strict=True):
            self.made[key] = self.made.get(key) or function(*job)
        return [self.made[key] for key in keys]


@pytest.fixture
def suite(module, tmp_path, monkeypatch):
    """suite(*options): the resources of two kernels, how many were compiled for them, and what the run reports."""
    cases = {"small": 32, "large": 64}

    def launches(block):
        return [(90, launch(module, block))]

    def run(*options, names=cases):
        compilers = Compilers()
        items = [SimpleNamespace(callspec=SimpleNamespace(params={"name": name})) for name in names]
        config = SimpleNamespace(stash={}, getoption={"--cubins": None, **dict.fromkeys(options, True)}.get)
        if "--cubins" in options:
            config.getoption = {"--cubins": str(tmp_path / "cubins")}.get
        request = SimpleNamespace(
            session=SimpleNamespace(items=items), config=config, getfixturevalue=lambda name: compilers
        )
        resources = compiling.compile_selected(request, cases, launches)
        return resources, compilers.jobs, config.stash[compiling.REPORT][0]

    monkeypatch.setattr(compiling, "TABLES", tmp_path / "compiled")
    monkeypatch.setattr(compiling, "part_of_commit", lambda: 0)
    monkeypatch.setattr(compiling, "part_of", lambda identity: 1)
    run.identities = {name: aot.identity(*launches(block)[0]) for name, block in cases.items()}
    run.path = tmp_path / "compiled" / f"{triton.__version__}.json"
    return run


def change(path, identity, column, by):
    document = json.loads(path.read_text())
    document["rows"][identity][1 + document["columns"].index(column)] += by
    path.write_text(json.dumps(document))


def test_without_a_table_everything_is_compiled_and_said(suite):
    resources, jobs, report = suite()
    assert jobs == 2
    assert "2 because" in report
    assert "make test-tiles" in report
    assert resources["small"][0].registers > 0
    assert not suite.path.exists()


def test_a_row_stands_for_its_kernel(suite):
    compiled, jobs, _ = suite("--write-tiles")
    assert jobs == 2
    read, jobs, report = suite()
    assert jobs == 0
    assert "make test-tiles" not in report
    assert {name: read[name] for name in read} == {name: compiled[name] for name in compiled}
    assert read["large"][0].opcodes["all"] > 10


@pytest.mark.parametrize("column", ["registers", "stack", "LDG", "all in loops", "dots"])
def test_a_row_whose_turn_it_is_must_come_out_as_it_says(suite, monkeypatch, column):
    resources, *_ = suite("--write-tiles")
    is_now = compiling.figures(resources["small"][0])[column]
    change(suite.path, suite.identities["small"], column, 3)
    suite()[0]["small"]  # not yet
    monkeypatch.setattr(compiling, "part_of", lambda identity: 0 if identity == suite.identities["small"] else 1)
    resources, jobs, _ = suite()
    assert jobs == 1
    with pytest.raises(pytest.fail.Exception, match=f"small.*: {column} {is_now + 3} in the table, {is_now} now"):
        resources["small"]
    assert resources["large"]


def test_all_tiles_are_compared(suite):
    suite("--write-tiles")
    change(suite.path, suite.identities["large"], "shared", 1)
    resources, jobs, _ = suite("--all-tiles")
    assert jobs == 2
    assert resources["small"]
    with pytest.raises(pytest.fail.Exception, match="shared"):
        resources["large"]


def test_all_cubins_are_kept(suite, tmp_path):
    suite("--write-tiles")
    _, jobs, _ = suite("--cubins")
    assert jobs == 2
    assert {path.name for path in (tmp_path / "cubins").iterdir()} == {"small.0.cubin", "large.0.cubin"}
    assert all(path.read_bytes()[:4] == b"\x7fELF" for path in (tmp_path / "cubins").iterdir())


def test_rows_that_nothing_compiles_any_more_harm_nobody_and_go(suite):
    suite("--write-tiles")
    whole = suite.path.read_text()
    document = json.loads(whole)
    row = document["rows"].pop(suite.identities["small"])
    document["rows"]["0" * 20] = row  # of a kernel that has changed since
    document["rows"]["1" * 20] = [row[0].replace("small", "gone"), *row[1:]]
    document["rows"]["2" * 20] = ["another_suite/small.0", *row[1:]]
    suite.path.write_text(json.dumps(document))
    resources, jobs, report = suite()
    assert jobs == 1
    assert "1 because" in report
    assert resources["small"]

    suite("--write-tiles", names=["small"])  # a part of the suite cannot know what the rest compiles
    kept = set(json.loads(suite.path.read_text())["rows"])
    assert kept == {*suite.identities.values(), "1" * 20, "2" * 20}
    suite("--write-tiles")
    document = json.loads(suite.path.read_text())
    assert document["rows"].pop("2" * 20)[0] == "another_suite/small.0"
    assert document == json.loads(whole)


def test_a_table_without_a_figure_that_tests_read_is_not_read(suite, monkeypatch):
    suite("--write-tiles")
    monkeypatch.setitem(compiling.FINDINGS, "stores", lambda texts: texts["ttir"].count("tt.store"))
    resources, jobs, report = suite()
    assert jobs == 2
    assert "2 because" in report
    assert resources["small"][0].findings["stores"] == 1


def test_a_line_for_each_row_in_the_order_of_names(suite):
    suite("--write-tiles")
    text = suite.path.read_text()
    _, jobs, _ = suite("--write-tiles")
    assert jobs == 0, "what has a row is compiled once more"
    assert suite.path.read_text() == text
    head, *rows, end = text.splitlines()
    assert head.startswith('{"columns":["registers","stack","shared","num_warps","HGMMA"')
    assert [row.split('"')[1] for row in rows] == [suite.identities["large"], suite.identities["small"]]
    assert end == "}}"


# --- parts -----------------------------------------------------------------------------------------------------------


def test_parts_are_about_equal(module):
    parts = [compiling.part_of(aot.identity(90, launch(module, block))) for block in range(2000)]
    counts = [parts.count(part) for part in range(compiling.PARTS)]
    assert sum(counts) == 2000
    assert min(counts) > 5  # of 20, give or take 4.5
    assert max(counts) < 42


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_as_many_commits_as_parts_have_them_all(tmp_path, monkeypatch):
    def git(*arguments):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path / "whole", check=True, capture_output=True)

    def part(folder):
        monkeypatch.setattr(compiling, "TABLES", tmp_path / folder / "tests" / "compiled")
        (tmp_path / folder / "tests").mkdir(exist_ok=True, parents=True)
        return compiling.part_of_commit()

    (tmp_path / "whole").mkdir()
    git("init", "-q")
    parts = []
    for _ in range(compiling.PARTS + 1):
        git("commit", "-q", "--allow-empty", "-m", "one")
        parts.append(part("whole"))
    assert parts == [*range(1, compiling.PARTS), 0, 1]
    # What a shallow clone has of the history says nothing.
    subprocess.run(["git", "clone", "-q", "--depth=1", f"file://{tmp_path}/whole", tmp_path / "shallow"], check=True)
    assert part("shallow") == 0
    assert part("no repository") == 0
