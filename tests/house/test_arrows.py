# SPDX-License-Identifier: Apache-2.0
"""The arrows between the parts, and habits of the package's code, read from the syntax trees of its files."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = [*sorted((ROOT / "kernels").glob("**/*.py")), *sorted((ROOT / "mlp").glob("**/*.py"))]
TESTS = sorted((ROOT / "tests").glob("**/*.py"))
BENCHES = sorted((ROOT / "benches").glob("**/*.py"))

# Rooms by floor, the lowest first. A room is a file or a folder; it may import itself and what lies below its floor.
FLOORS = [
    {"kernels.records", "kernels.activations", "kernels.operands", "kernels.trial", "kernels.forks"},
    {"kernels.tables", "kernels.peaks"},
    {"kernels.crossover"},
    {"kernels.plan", "kernels.hyperparameters"},
    {"kernels.reference", "kernels.loop", "kernels.native", "kernels.gpu", "kernels.devices"},
    {"kernels.eligibility", "kernels.small"},
    {"kernels.calls"},
    {"kernels.ops", "kernels.train"},
    {"kernels.explain", "kernels.registration"},
    {"kernels"},
    {"mlp.functional", "mlp.capturing", "mlp.history"},
    {"mlp.layers", "mlp.hub_layers", "mlp.backend"},
    {"mlp.chains"},
    {"mlp.sequential"},
    {"mlp.model"},
    {"mlp.as_network", "mlp.fusing"},
    {"mlp.ensemble"},
    {"mlp.training"},
    {"mlp.estimator", "mlp.lessons", "mlp.reporting"},
    {"mlp"},
    {"mlp.doctor", "mlp.hub"},
    {"mlp.__main__"},
    {""},  # the package itself, in mlp/_front
    {"__main__"},
]


def name(path):
    return str(path.relative_to(ROOT))


def imported(source, package=""):
    """The dotted name of everything that a source text imports, at any depth; relative names are made absolute.

    `package` is where the file lives, as in "perceptriton.mlp". `from .a import b` may mean a module b or a name b
    in a module a: both a and a.b are in the set.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return names


def home_of(path):
    folder = ".".join(path.relative_to(ROOT).parent.parts)
    return f"perceptriton.{folder}".removesuffix(".mlp._front") if path in PACKAGE else folder


def imports_of(path):
    return imported(path.read_text(), home_of(path))


def dotted(path):
    """The name of a file of the package as a module, of an `__init__.py` that of its folder."""
    return home_of(path) if path.stem == "__init__" else f"{home_of(path)}.{path.stem}"


MODULES = {dotted(path) for path in PACKAGE}


def room_of(module):
    """The room in which a module lies: "mlp.lessons" for "perceptriton.mlp.lessons.race"."""
    return ".".join(module.split(".")[1:3])


def climbs(source, module, folder=False):
    """The rooms that a source text of this module, or of this folder's face, imports although they lie no lower."""
    met = set()
    for node in (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.ImportFrom)):
        names = imported(ast.unparse(node), module if folder else module.rpartition(".")[0])
        base = min(names, key=len)
        # `from .a import b` means the module a.b if there is one.
        met |= {room_of(name if name in MODULES else base) for name in names - {base} if base in MODULES}
    floor = next(i for i, rooms in enumerate(FLOORS) if room_of(module) in rooms)
    return sorted(met - {room_of(module)} - set().union(*FLOORS[:floor]))


def under(names, *roots):
    """Those of the names that are one of the roots or lie inside one."""
    return sorted(n for n in names if any(n == root or n.startswith(root + ".") for root in roots))


def jitted(tree):
    """The functions under @triton.jit."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [f for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)]


def test_imported_sees_every_form():
    source = "import a.b\ndef f():\n    from ..kernels import ops\n    from . import x\n    from c import d as e"
    found = imported(source, "perceptriton.mlp")
    assert found >= {"a.b", "perceptriton.kernels.ops", "perceptriton.mlp.x", "c.d"}
    assert under(found, "perceptriton.kernels") == ["perceptriton.kernels", "perceptriton.kernels.ops"]
    assert under({"tritonish"}, "triton") == []


# --- which way imports run ---------------------------------------------------------------------------------


def test_every_room_has_a_floor():
    assert {room_of(module) for module in MODULES} == set().union(*FLOORS)
    assert sum(map(len, FLOORS)) == len(set().union(*FLOORS)), "on two floors"


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_imports_go_downstairs(path):
    assert climbs(path.read_text(), dotted(path), path.name == "__init__.py") == []
    # Our own names are relative in the package: only those resolve alike on disk, installed and in a type checker.
    ours = {p.stem for p in (*TESTS, *BENCHES)} | {"tests", "benches", "kernels", "mlp", "perceptriton"}
    assert under(imported(path.read_text(), "some.deep.package"), *ours) == []


@pytest.mark.parametrize(
    ("source", "module", "rooms"),
    [
        ("from .. import ops", "kernels.plan.layer", ["kernels.ops"]),
        ("from ..loop import TorchLoop", "kernels.gpu.train", ["kernels.loop"]),
        ("def f():\n    from . import gpu", "kernels.devices", ["kernels.gpu"]),
        ("from ..mlp import MLP", "kernels.ops", ["mlp"]),
        ("from .training import fit", "mlp.ensemble", ["mlp.training"]),
        ("from ..kernels import explain", "mlp.functional.layer", []),
        ("from ..records import Plan\nfrom .wide import wide_fwd", "kernels.plan.layer", []),
        ("from ...kernels import ops, reference", "mlp.functional.layer", []),
    ],
)
def test_planted_imports_are_found(source, module, rooms):
    assert climbs(source, f"perceptriton.{module}") == rooms


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_only_the_gpu_room_imports_triton(path):
    assert path.parent.name == "gpu" or under(imports_of(path), "triton") == []


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_only_the_native_room_imports_numba(path):
    assert path.parent.name == "native" or under(imports_of(path), "numba", "llvmlite") == []


def private_names(source, home):
    """Names with an underscore that a source text takes from other files of the package, by import or as attributes."""
    tree, taken, modules = ast.parse(source), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.level or (node.module or "").startswith("perceptriton")):
            taken |= {alias.name for alias in node.names}
            modules |= {alias.asname or alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            taken.add(node.attr)
    return sorted(own for own in taken if own.startswith("_") and not own.startswith("__"))


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_no_private_name_leaves_its_file(path):
    found = [own for own in private_names(path.read_text(), home_of(path)) if not (path.parent / f"{own}.py").exists()]
    assert found == []


def test_private_names_are_found():
    source = "from .a import _b, c\nfrom . import d\nd._e()\nself._f\nfrom os import _exit"
    assert private_names(source, "perceptriton.mlp") == ["_b", "_e"]


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_files_have_300_lines_at_most(path):
    assert len(path.read_text().splitlines()) <= 300


def test_plans_are_numbers_and_names():
    for path in PACKAGE:
        if room_of(dotted(path)) in ("kernels.plan", "kernels.crossover", "kernels.tables", "kernels.records"):
            tops = {n.partition(".")[0] for n in imports_of(path)}
            assert tops - sys.stdlib_module_names <= {"perceptriton"}, name(path)


def test_tests_and_benches_do_not_import_each_other():
    tests, benches = ({p.stem for p in paths if p.stem != "__init__"} for paths in (TESTS, BENCHES))
    assert tests & benches - {"conftest"} == set(), "both folders are on the path: one name, one module"
    for paths, others, folder in ((TESTS, benches, "benches"), (BENCHES, tests, "tests")):
        for path in paths:
            assert under(imports_of(path), folder, *others - {"conftest"}) == [], name(path)


# --- habits ------------------------------------------------------------------------------------------------


def calls(source, *functions):
    """Lines on which one of the functions is called, by its bare name or as an attribute."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", None)
            if called in functions:
                found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_nothing_prints_but_the_command_line_and_the_report(path):
    may = path in (ROOT / "mlp" / "__main__.py", ROOT / "mlp" / "reporting.py")
    functions = ("device_print", "breakpoint") if may else ("print", "device_print")
    assert calls("x = 1\nprint(x)\ntl.device_print('x', x)", "print", "device_print") == [2, 3]
    assert calls(path.read_text(), *functions) == []


def launches(source):
    """(line, kernel, keywords) of every launch, as in `some_kernel[grid](a=1)` and `Launch(some_kernel, .., a=1)`."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            indexed = isinstance(node.func, ast.Subscript) and "kernel" in ast.unparse(node.func.value)
            handed = isinstance(node.func, ast.Name) and node.func.id == "Launch"
            keywords = {keyword.arg for keyword in node.keywords}
            # What hands on the keywords of its own call is no launch of a kernel in particular.
            if (indexed or (handed and keywords)) and keywords != {None}:
                kernel = node.func.value if indexed else node.args[0]
                found.append((node.lineno, ast.unparse(kernel), keywords))
    return found


def test_launches_say_whether_products_and_sums_are_fused():
    # The compiler's own choice changes between versions, and with it the last bits of results; triton 3.9 warns, at a
    # user's first launch, of every kernel that leaves it open.
    source = "x[1](2)\na_kernel[(1,)](p=q, num_warps=4)\nLaunch(a_kernel, (1,), p=q)\nkernel[(1,)](**options)"
    assert launches(source) == [(2, "a_kernel", {"p", "num_warps"}), (3, "a_kernel", {"p"})]
    found = {(name(path), line): options for path in PACKAGE for line, _, options in launches(path.read_text())}
    assert len(found) >= 9
    assert [place for place, options in found.items() if "enable_fp_fusion" not in options] == []


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_nothing_tunes_at_run_time(path):
    # A multi-config @triton.autotune cannot even launch without a GPU, and it may run a kernel twice over its outputs.
    assert "autotune" not in attributes(ast.parse(path.read_text()))
    assert under(imports_of(path), "triton.autotune", "triton.heuristics") == []


@pytest.mark.parametrize("folder", ["kernels", "mlp"])
def test_init_says_what_is_public(folder):
    package = importlib.import_module(f"perceptriton.{folder}")
    assert package.__all__
    assert set(package.__all__) <= vars(package).keys()


# --- 64-bit offsets ----------------------------------------------------------------------------------------

BOUNDED, UNBOUNDED, WIDE = "tl.arange in 32 bits", "a program's number in 32 bits", "64 bits"
# The others (tl.load, tl.sum, tl.dot, ...) return data, which is no offset.
KEEP_KIND = {"minimum", "maximum", "where", "expand_dims", "broadcast_to", "reshape", "multiple_of", "max_contiguous"}


class Offsets(ast.NodeVisitor):
    """Products of a kernel that may pass 2^31 before anything widens them.

    A stride may be any number, so nothing in 32 bits may be multiplied with one, not even a `tl.arange`. A size
    (an argument that is no constexpr) may be multiplied with a `tl.arange`, which is shorter than a tile, but not
    with what grows with the grid: program numbers, and indices of loops that run to such numbers or to a size.
    """

    def __init__(self, kernel):
        arguments = [*kernel.args.args, *kernel.args.kwonlyargs]
        self.sizes = {a.arg for a in arguments if a.annotation is None or "constexpr" not in ast.unparse(a.annotation)}
        self.kinds = {}
        self.found = {}
        for statement in kernel.body:
            self.visit(statement)

    def kind(self, node):
        if isinstance(node, ast.Name):
            return self.kinds.get(node.id)
        if isinstance(node, ast.Subscript):
            return self.kind(node.value)
        if isinstance(node, ast.UnaryOp):
            return self.kind(node.operand)
        if isinstance(node, ast.IfExp):
            return self.join([node.body, node.orelse])
        if isinstance(node, ast.BinOp):
            parts = [self.kind(node.left), self.kind(node.right)]
            return WIDE if WIDE in parts else self.join([node.left, node.right])
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            return self.kind_of_call(node, node.func)
        return None

    def kind_of_call(self, node, function):
        if function.attr == "program_id":
            return UNBOUNDED
        if function.attr == "arange":
            return BOUNDED
        if function.attr in ("to", "cast", "full", "zeros"):
            if "int64" in ast.unparse(node):
                return WIDE
            return self.kind(function.value if function.attr == "to" else node.args[0])
        return self.join(node.args) if function.attr in KEEP_KIND else None

    def join(self, nodes):
        kinds = {self.kind(node) for node in nodes}
        return next((kind for kind in (UNBOUNDED, BOUNDED, WIDE) if kind in kinds), None)

    def assign(self, target, kind):
        if isinstance(target, ast.Name):
            self.kinds[target.id] = kind
        elif isinstance(target, ast.Tuple):
            for element in target.elts:
                self.assign(element, kind)

    def visit_Assign(self, node):
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                for element, value in zip(target.elts, node.value.elts, strict=True):
                    self.assign(element, self.kind(value))
            else:
                self.assign(target, self.kind(node.value))

    def visit_AugAssign(self, node):
        product = ast.BinOp(node.target, node.op, node.value)
        self.visit(ast.copy_location(product, node))
        self.assign(node.target, self.kind(product))

    def visit_For(self, node):
        names = {n.id for n in ast.walk(node.iter) if isinstance(n, ast.Name)}
        grows = names & self.sizes or any(self.kind(a) == UNBOUNDED for a in getattr(node.iter, "args", []))
        self.assign(node.target, UNBOUNDED if grows else None)
        self.visit_loop(node)

    def visit_loop(self, node):
        # Twice: what a loop assigns at its end is used at its start.
        self.generic_visit(node)
        self.generic_visit(node)

    visit_While = visit_loop

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if not isinstance(node.op, ast.Mult) or self.kind(node) == WIDE:
            return
        for index, factor in ((node.left, node.right), (node.right, node.left)):
            names = {n.id for n in ast.walk(factor) if isinstance(n, ast.Name)} & self.sizes
            strides = {n for n in names if n.startswith("stride")}
            if {UNBOUNDED: names, BOUNDED: strides}.get(self.kind(index)):
                self.found[node.lineno] = f"line {node.lineno}: {ast.unparse(node)} ({self.kind(index)})"


def narrow_offsets(source):
    return [found for kernel in jitted(ast.parse(source)) for found in Offsets(kernel).found.values()]


@pytest.mark.parametrize("path", [p for p in PACKAGE if jitted(ast.parse(p.read_text()))], ids=name)
def test_offsets_have_64_bits(path):
    assert narrow_offsets(path.read_text()) == []


NARROW = {
    "arange-by-stride": "offs = tl.arange(0, BLOCK)\n    tl.load(x_ptr + offs[:, None] * stride_xm)",
    "stride-first": "tl.load(x_ptr + stride_xm * tl.arange(0, BLOCK)[None, :])",
    "program-by-size": "rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)\n    tl.load(x_ptr + rows * N)",
    "cast-too-late": "pid = tl.program_id(0)\n    tl.load(x_ptr + (pid * stride_xm).to(tl.int64))",
    "cast-to-32": "pid = tl.program_id(0).to(tl.int32)\n    x_ptr += pid * stride_xm",
    "loop-index": "for tile in tl.range(tl.program_id(0), 9):\n        tl.load(x_ptr + tile * BLOCK * N)",
    "loop-to-size": "for row in range(M):\n        tl.load(x_ptr + row * N)",
    "carried": "row = 0\n    for _ in range(3):\n        tl.load(x_ptr + row * N)\n        row = tl.program_id(0)",
    "in-place": "pid = tl.program_id(0)\n    pid *= stride_xm",
    "through-minimum": "tl.load(x_ptr + tl.minimum(tl.program_id(0), 7) * stride_xm)",
}
CLEAN = {
    "cast-first": "offs = tl.arange(0, BLOCK).to(tl.int64)\n    tl.load(x_ptr + offs[:, None] * stride_xm)",
    "one-wide-term": "row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)\n    x_ptr += row * stride_xm",
    "cast-function": "for tile in range(tl.program_id(0), M):\n        x_ptr += tl.cast(tile, tl.int64) * N",
    "arange-by-size": "tl.load(x_ptr + tl.arange(0, BLOCK)[:, None] * N)",
    "program-by-tile": "mask = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK) < M",
    "loaded-data": "offs = tl.load(x_ptr + tl.arange(0, BLOCK))\n    y = offs * stride_xm",
    "static-loop": "for i in tl.static_range(4):\n        tl.load(x_ptr + i * stride_xm)",
}


def kernel_source(body):
    return f"@triton.jit\ndef kernel(x_ptr, M, N, stride_xm, BLOCK: tl.constexpr):\n    {body}\n"


@pytest.mark.parametrize("name", [*NARROW, *CLEAN])
def test_the_check_of_offsets_finds_the_narrow_ones(name):
    assert len(narrow_offsets(kernel_source((NARROW | CLEAN)[name]))) == (name in NARROW)


# --- what a kernel may do ----------------------------------------------------------------------------------

GPU = [p for p in PACKAGE if p.parent.name == "gpu"]
KERNEL_FILES = [p for p in GPU if jitted(ast.parse(p.read_text()))]


def attributes(tree):
    return {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


# What is fp32 whatever the dtype of the tensors is.
FP32 = {"slots_ptr", "sums_ptr"}
LOADS = {"tl.load", "load_block", "load_weight", "load_weight_t"}


def narrow_arithmetic(source):
    """Lines of kernels that compute with what was loaded, in whatever type it was stored.

    In 16 bits the interpreter's arithmetic is silently wrong, and the hardware's rounds at every step. Between a load
    and arithmetic stands `.to(...)` or `operand(...)`, which widens where the interpreter asks for it.
    """

    def loads(node):
        if not isinstance(node, ast.Call):
            return False
        called = ast.unparse(node.func)
        known = {n.id for argument in node.args for n in ast.walk(argument) if isinstance(n, ast.Name)} & FP32
        return (called in LOADS or called.endswith("_desc.load")) and not known

    found = []
    for kernel in jitted(ast.parse(source)):
        assigned = [(ast.unparse(n.targets[0]), n.value) for n in ast.walk(kernel) if isinstance(n, ast.Assign)]
        raw = {target for target, value in assigned if loads(value)}
        # Widened under its own name.
        raw -= {t for t, value in assigned if ast.unparse(value).startswith((f"operand({t}, ", f"{t}.to("))}
        for node in ast.walk(kernel):
            computes = isinstance(node, ast.BinOp | ast.UnaryOp | ast.AugAssign)
            if isinstance(node, ast.Call):
                computes = ast.unparse(node.func) in ("tl.dot", "tl.sum", "tl.exp", "tl.exp2", "tl.maximum", "tl.where")
            if computes:
                parts = [part for part in ast.iter_child_nodes(node) if loads(part) or ast.unparse(part) in raw]
                found += [part.lineno for part in parts]
    return found


# The loops train fp32 alone.
@pytest.mark.parametrize("path", [p for p in KERNEL_FILES if not p.name.startswith("train")], ids=name)
def test_nothing_is_computed_in_sixteen_bits(path):
    assert narrow_arithmetic(path.read_text()) == []


@pytest.mark.parametrize(
    "body",
    [
        "x = tl.load(x_ptr)\n    y = x * 2",
        "y = -tl.load(x_ptr)",
        "acc = 0.0\n    acc += tl.load(x_ptr)",
        "x = x_desc.load([0, 0])\n    y = tl.dot(x, x)",
        "x = load_block(x_ptr, 0)\n    y = tl.sum(x)",
    ],
)
def test_the_check_of_sixteen_bits_finds(body):
    assert narrow_arithmetic(kernel_source(body)) != []
    assert narrow_arithmetic(kernel_source("x = tl.load(x_ptr).to(tl.float32)\n    y = x * 2")) == []
    assert narrow_arithmetic(kernel_source("x = tl.load(x_ptr)\n    y = tl.dot(operand(x, 1), operand(x, 1))")) == []


def atomics(source):
    """What is done to memory by atomics, but for counts of programs."""
    tree = ast.parse(source)
    calls = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = [n for n in ast.walk(tree) if isinstance(n, ast.Attribute) and n.attr.startswith("atomic")]
    texts = [ast.unparse(calls.get(id(node), node)) for node in found]
    return sorted(text for text in texts if not text.startswith("tl.atomic_add(progress_ptr, 1"))


@pytest.mark.parametrize("path", KERNEL_FILES, ids=name)
def test_results_are_written_without_atomics(path):
    # Sums in an order that changes from run to run have other bits each time. Programs that are done may be counted.
    assert atomics("tl.atomic_add(y_ptr, 1.0)\ntl.atomic_add(progress_ptr, 1)\nx = tl.atomic_max") == [
        "tl.atomic_add(y_ptr, 1.0)",
        "tl.atomic_max",
    ]
    assert atomics(path.read_text()) == []


def test_every_launch_is_looked_at():
    launched = {kernel for path in GPU for _, kernel, _ in launches(path.read_text())}
    kernels = {
        f.name for path in KERNEL_FILES for f in jitted(ast.parse(path.read_text())) if f.name.endswith("_kernel")
    }
    # Of two that take the same arguments the launcher picks one, under the name `kernel`.
    assert "kernel" in launched
    assert kernels - launched == {
        *("train_lane_kernel", "train_block_kernel", "train_spread_kernel"),
        *("linear_act_fwd_rows_kernel", "linear_act_fwd_tiled_kernel"),
    }
    assert launched >= {"sum_slots_kernel", "sum_losses_kernel"}


# --- nothing is read or run that nobody asked for --------------------------------------------------------------


def runs_data(source):
    """What of a source text could turn data into code."""
    tree = ast.parse(source)
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return sorted(called & {"eval", "exec", "compile", "__import__"}) + under(
        imported(source, "some.package"), "pickle", "marshal", "shelve", "dill", "joblib", "yaml"
    )


def reads_environment(source):
    """Lines on which a source text takes the environment, or triton's view of it, as an attribute or by import."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "knobs"}
    return sorted(
        node.lineno
        for node in ast.walk(ast.parse(source))
        if (isinstance(node, ast.Attribute) and node.attr in names)
        or (isinstance(node, ast.ImportFrom) and names & {alias.name for alias in node.names})
    )


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_nothing_runs_data(path):
    assert runs_data("import pickle\neval('1')") == ["eval", "pickle"]
    assert runs_data(path.read_text()) == []


@pytest.mark.parametrize("path", PACKAGE, ids=name)
def test_the_environment_is_not_read(path):
    # An import must not depend on where it happens. `perceptriton doctor` says what this machine is set to.
    assert reads_environment("import os\nos.environ['A']\nfrom os import getenv as g\nos.getenv('A')") == [2, 3, 4]
    # Nor does one on what `ready` asks when a loop is planned: where numba was told to keep what it compiles.
    if path.name not in ("doctor.py", "ready.py"):
        assert reads_environment(path.read_text()) == []
