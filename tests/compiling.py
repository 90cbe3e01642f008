# SPDX-License-Identifier: Apache-2.0
"""What the compile-only tests share: cases compiled ahead of time in all cores, and tables of what came out.

`compiled/<triton's version>.json` has a row for each kernel that the cases compile. Tests read the row: a run compiles
what has none, because something in it changed, and a fortieth of the rest, which must come out as the row says. Each
commit has another fortieth, so that forty in succession have them all. `make test-tiles` compiles everything and
writes the tables.
"""

import dataclasses
import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from machine_code import DOTS, dangerous_dots, lost_bounds, overwritten_operands

from perceptriton.kernels import Device, tables
from perceptriton.kernels.peaks import PEAKS
from perceptriton.kernels.plan.chips import LAYER_CHIPS

# The first of each compute capability, without its name, by which it would have tables of its own.
CHIPS: dict[int, Device] = {}
for peaks in sorted(PEAKS.values(), key=lambda peaks: peaks.device.arch):
    CHIPS.setdefault(peaks.device.arch, dataclasses.replace(peaks.device, name=""))
# Those that have tiles of their own for layers and networks.
TILED_FOR = tuple(sorted(int(chip.removeprefix("sm_")) for chip in LAYER_CHIPS))
PRINTED = ("HGMMA", "HMMA", "FFMA", "MUFU")
PER_PROGRAM = ("registers", "stack", "shared", "num_warps")
TABLES = Path(__file__).with_name("compiled")
PARTS = 100
REPORT = pytest.StashKey()  # lines for the end of a run

# What tests gate besides the machine code: a name, and how often it is found in the compiler's texts, "ttir", "ttgir",
# "ptx" and "sass". Rows hold these numbers; a table that lacks one of them counts as empty.
FINDINGS = {
    "dots": lambda texts: sum(len(re.findall(rf"\b{re.escape(op)}\b", texts["ttgir"])) for op in DOTS),
    "transposes": lambda texts: texts["ttgir"].count("tt.trans"),
    "dangerous dots": lambda texts: len(dangerous_dots(texts["ttgir"])),
    "lost bounds": lambda texts: lost_bounds(texts["ttir"], texts["ttgir"]),
    "overwritten operands": lambda texts: len(overwritten_operands(texts["sass"])),
}
# Places where a compiler is known to make wrong code of what is right: no kernel may have any.
WRONG = ("dangerous dots", "lost bounds", "overwritten operands")


def compile_for(arch, launch):
    """Resources with these findings, compiled whatever a table says."""
    from perceptriton.kernels.gpu import aot

    return aot.compile_for(arch, launch, FINDINGS)


class Compiled(dict):
    """name -> Resources of each kernel of a case. A test of a case that came out unlike the table fails."""

    def __init__(self, resources, unlike):
        super().__init__(resources)
        self.unlike = unlike

    def __getitem__(self, name):
        if self.unlike[name]:
            pytest.fail("\n".join(self.unlike[name]), pytrace=False)
        return super().__getitem__(name)


def compile_selected(request, cases, launches):
    """name -> Resources of what launches(case) lists, pairs (arch, Launch), for the cases that selected tests name.

    Prints a row per launch, and writes the cubins into the folder that --cubins names.
    """
    import triton

    from perceptriton.kernels.gpu import aot

    option = request.config.getoption
    selected = {item.callspec.params.get("name") for item in request.session.items if hasattr(item, "callspec")}
    names = [name for name in cases if name in selected]
    identities = {name: [aot.identity(*own) for own in launches(cases[name])] for name in names}
    places = {}  # of each kernel, the case that has it first
    for name in names:
        for index, identity in enumerate(identities[name]):
            places.setdefault(identity, (name, index))

    table = Table(TABLES / f"{triton.__version__}.json")
    part = part_of_commit()
    everything, writing = option("--all-tiles") or option("--cubins"), option("--write-tiles")
    due = [own for own in places if everything or own not in table.rows or (not writing and part_of(own) == part)]
    jobs = [(launches, cases[name], index) for name, index in map(places.get, due)]
    made = request.getfixturevalue("compilers").starmap(_compile, jobs, 1) if jobs else []
    fresh = {own: resources for own, (resources, _) in zip(due, made, strict=True)}
    if folder := option("--cubins"):
        cubins = {own: cubin for own, (_, cubin) in zip(due, made, strict=True)}
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name in names:
            for index, own in enumerate(identities[name]):
                (Path(folder) / f"{name}.{index}.cubin").write_bytes(cubins[own])

    suite = launches.__module__
    report = f"{suite} on triton {triton.__version__}: {len(places)} kernels, {len(due)} of them compiled"
    if writing:
        labels = {own: "{}/{}.{}".format(suite, *place) for own, place in places.items()}
        rows = {own: fresh.get(own) or table.rows[own] for own in places}
        table.update(rows, labels, suite if names == list(cases) else None)
        report += f", {table.path.name} written"
    elif new := len(fresh.keys() - table.rows.keys()):
        report += f", {new} because {table.path.name} has no row for them (make test-tiles writes it)"
    request.config.stash.setdefault(REPORT, []).append(report)

    resources = table.rows | fresh
    print("\n" + f"{'kernel':64}" + "".join(f"{head:>7}" for head in ("regs", "stack", "smem", "warps", *PRINTED)))
    for name in names:
        for own in map(resources.get, identities[name]):
            cells = (own.registers, own.stack, own.shared, own.num_warps, *map(own.opcodes.get, PRINTED))
            print(f"{name:64}" + "".join(f"{cell:7}" for cell in cells))
    return Compiled(
        {name: [resources[own] for own in identities[name]] for name in names},
        {name: [line for own in identities[name] for line in table.unlike(own, resources[own])] for name in names},
    )


def _compile(launches, case, index):
    """Resources and cubin of one of the launches of a case."""
    from perceptriton.kernels.gpu import aot

    compiled = aot.compiled(*launches(case)[index])
    return aot.measure(compiled, FINDINGS), compiled.asm["cubin"]


# --- the table of what came out --------------------------------------------------------------------------------------


def part_of(identity):
    return int(identity, 16) % PARTS


def part_of_commit():
    """Which part's turn it is: commits so far, modulo the number of parts, and 0 where there is no history to count."""

    def git(*arguments):
        return subprocess.run(
            ["git", *arguments], cwd=TABLES.parent, check=True, capture_output=True, text=True
        ).stdout.strip()

    try:
        whole = git("rev-parse", "--is-shallow-repository") == "false"
        return int(git("rev-list", "--count", "HEAD")) % PARTS if whole else 0
    except (OSError, subprocess.CalledProcessError):
        return 0


def figures(resources):
    """Resources as numbers by name."""
    own = {name: getattr(resources, name) for name in PER_PROGRAM}
    loops = {f"{name} in loops": count for name, count in resources.loop_opcodes.items()}
    return own | resources.opcodes | loops | resources.findings


def resources_of(numbers):
    """The inverse of `figures`. A KeyError names what is missing."""
    from perceptriton.kernels.gpu import aot

    own, counted = (numbers[name] for name in PER_PROGRAM), (*aot.OPCODES, "all")
    opcodes, loop_opcodes = ({name: numbers[name + where] for name in counted} for where in ("", " in loops"))
    return aot.Resources(*own, opcodes, loop_opcodes, {name: numbers[name] for name in FINDINGS})


class Table:
    """Resources by identity, in a file with a line for each kernel. `labels` say to people which case it is."""

    def __init__(self, path):
        self.path, self.rows, self.labels = path, {}, {}
        if not path.exists():
            return
        document = json.loads(path.read_text())
        try:
            for identity, (label, *numbers) in document["rows"].items():
                self.rows[identity] = resources_of(dict(zip(document["columns"], numbers, strict=True)))
                self.labels[identity] = label
        except KeyError:  # tests have come to read more than it holds
            self.rows, self.labels = {}, {}

    def unlike(self, identity, resources):
        """What the row of a kernel says otherwise, a line for each figure."""
        if (row := self.rows.get(identity)) in (None, resources):
            return []
        says, has = figures(row), figures(resources)
        where = f"{self.labels[identity]} ({identity} in {self.path.name})"
        return [
            f"{where}: {name} {says[name]} in the table, {has[name]} now" for name in has if says[name] != has[name]
        ]

    def update(self, rows, labels, suite=None):
        """Writes these rows. Those that had their labels go, and with `suite` all others of that suite."""
        stale = set(labels.values())
        for identity, label in list(self.labels.items()):
            if label in stale or label.split("/")[0] == suite:
                del self.rows[identity], self.labels[identity]
        self.rows |= rows
        self.labels |= labels
        compact = json.JSONEncoder(separators=(",", ":")).encode
        columns = list(figures(next(iter(self.rows.values()))))
        lines = ",\n".join(
            f"{compact(identity)}:{compact([label, *figures(self.rows[identity]).values()])}"
            for identity, label in sorted(self.labels.items(), key=lambda row: row[::-1])
        )
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text(f'{{"columns":{compact(columns)},"rows":{{\n{lines}\n}}}}\n')


# --- gates -----------------------------------------------------------------------------------------------------------


def assert_sound(resources):
    assert {name: resources.findings[name] for name in WRONG} == dict.fromkeys(WRONG, 0)


def assert_fits(resources, arch):
    """Neither spills nor too much shared memory.

    Tables of tiles name the tritons whose compilers they were made with. Another one may spill a few bytes where these
    do not: reported, and no fault. What it compiles must fit and compute all the same.
    """
    import triton

    from perceptriton.kernels.gpu import aot

    assert resources.shared <= aot.SHARED_LIMIT[arch]
    if triton.__version__ not in tables.read_table("gpu_tiles.json")["triton"] and resources.spills:
        pytest.xfail(f"triton {triton.__version__}, with which no table was made, spills {resources.stack} bytes")
    assert resources.stack == 0, f"{resources.stack} bytes of stack per thread"
    assert not resources.spills


# --- what was compiled -----------------------------------------------------------------------------------------------


def _real(value):
    if isinstance(value, tuple):
        return tuple(map(_real, value))
    if hasattr(value, "block_shape"):  # a tensor descriptor
        return dataclasses.replace(value, base=_real(value.base))
    return torch.empty_like(value, device="cpu") if isinstance(value, torch.Tensor) else value


def launch_signature(launch):
    """Types, constants and attributes that triton's own launch code derives from the arguments of a recorded launch."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    kernel = launch.kernel
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    # Tensors on a device that has addresses; "meta" has none.
    arguments = {name: _real(value) for name, value in launch.arguments.items()}
    keywords = arguments | launch.options | {"debug": False, "instrumentation_mode": ""}
    bound, specialization, options = binder(**keywords)
    _, types, constants, attributes = kernel._pack_args(backend, keywords, bound, specialization, options)
    return types, constants, {path: value for path, value in attributes.items() if value}


def assert_is_what_a_launch_compiles(launch):
    """What is compiled here ahead of time is what a launch on a GPU would compile."""
    from perceptriton.kernels.gpu import aot

    source = aot.source(launch)
    assert (source.signature, source.constants, source.attrs) == launch_signature(launch)
