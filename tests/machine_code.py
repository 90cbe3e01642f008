# SPDX-License-Identifier: Apache-2.0
"""What compilers are known to have made of kernels like ours, looked for in what they made of ours.

Each function takes a compiler's text and counts, or lists, places that would compute wrong numbers.
"""

import re
from collections import defaultdict

# --- products of transposed products ----------------------------------------------------------------------------------

DOTS = ("tt.dot", "ttng.warp_group_dot", "ttng.tc_gen5_mma")


def dangerous_dots(ttgir):
    """Dots whose left operand is the transpose, in registers, of something that came from another dot.

    On Hopper they were reported to compute wrong numbers (flash-linear-attention #640). Between the transpose and the
    dot there may be conversions, arithmetic and a round trip through shared memory. Dots whose result is laid out in
    blocks are for FMA units, whose instructions read their operands when they are issued.
    """
    definitions, on_tensor_cores = {}, []
    for line in ttgir.splitlines():
        if found := re.match(r'\s*(%\w+)(?::\d+)? = "?([\w.]+)"?(.*)', line):
            definitions[found[1]] = (found[2], re.findall(r"%\w+", found[3]))
            if found[2] in DOTS and not re.search(r"-> tensor<[^>]*#blocked", line):
                on_tensor_cores.append(found[1])

    def reaches(value, stops, goal, seen):
        """Whether following operands back from `value`, not past `stops`, arrives at an op that is a goal."""
        if value in seen or value not in definitions:
            return False
        seen.add(value)
        op, operands = definitions[value]
        if goal(op, operands):
            return True
        return op not in stops and any(reaches(operand, stops, goal, seen) for operand in operands)

    def from_dot(op, operands):
        return op in DOTS

    def transposed_dot(op, operands):
        return op == "tt.trans" and any(reaches(operand, ("tt.load",), from_dot, set()) for operand in operands)

    lefts = ((value, operands[0]) for value in on_tensor_cores if (operands := definitions[value][1]))
    return [value for value, left in lefts if reaches(left, (*DOTS, "tt.load"), transposed_dot, set())]


# --- bounds of nested loops -------------------------------------------------------------------------------------------

VALUE = re.compile(r"%[\w$.-]+")


def carried_bounds(ir):
    """How often a loop's bound depends on a value that a loop around it carries: pairs of a loop and such a value.

    ir: TTIR or TTGIR. A value depends on what the operations before it were given, results of regions on what these
    yield. Where the first has more such pairs than the second, a compiler has lost a bound: triton 3.6.0 and 3.7.1 put
    the first value in the place of what is used for nothing else (triton-lang/triton PR 9036).
    """
    depends = defaultdict(frozenset)  # value -> the carried values that it depends on
    regions = []  # of each that is open: what it carries, the names of its results, what these depend on
    pairs = 0

    def upon(names):
        return frozenset().union(*(depends[name] for name in names))

    for line in ir.splitlines():
        text = re.sub(r"\bloc\(.*", "", line).strip()
        results, rest = text.split(" = ", 1) if text.startswith("%") else ("", text)
        made, used = VALUE.findall(results), VALUE.findall(rest)
        if found := re.match(r"scf\.for (%\S+) = (%\S+) to (%\S+) step (%\S+)", rest):
            bounds = upon(VALUE.findall(" ".join(found.groups()[1:])))
            pairs += len(bounds & {value for carried, *_ in regions for value in carried})
            first = re.search(r"iter_args\((.*?)\) ->", rest)
            starts = re.findall(r"(%[\w$.-]+) = (%[\w$.-]+)", first[1]) if first else []
            for value, start in starts:
                depends[value] = depends[start] | {value}
            depends[found[1]] = bounds
            regions.append(({value for value, _ in starts}, made, bounds))
        elif text.endswith("{"):
            if text.startswith("}") and regions:  # else
                continue
            regions.append((set(), made, upon(used)))
        elif text.startswith("}") and regions:
            _, names, depended = regions.pop()
            for value in names:
                depends[value] = depended
        elif rest.startswith(("scf.yield", "scf.condition")) and regions:
            carried, names, depended = regions[-1]
            regions[-1] = carried, names, depended | upon(used)
        else:
            for value in made:
                depends[value] = upon(used)
    return pairs


def lost_bounds(ttir, ttgir):
    """How many dependences of loops' bounds on carried values the way from TTIR to TTGIR has lost."""
    return max(0, carried_bounds(ttir) - carried_bounds(ttgir))


# --- registers of asynchronous products -------------------------------------------------------------------------------

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
# Results of other instructions than these are their first operand.
NO_RESULT = (
    *("ST", "RED", "BAR", "BRA", "EXIT", "WARP", "DEPBAR", "MEMBAR", "FENCE", "NOP", "UTMA", "SYNCS", "ERRBAR", "CCTL"),
    *("BSYNC", "BSSY", "LDGSTS", "LDGDEPBAR", "UBLKCP", "CALL", "RET", "KILL", "ELECT", "ENDCOLLECTIVE"),
)


def _written(operation, operands):
    """Numbers of the registers that an instruction writes, as many as its suffixes say."""
    if operation.startswith(NO_RESULT):
        return frozenset()
    results = [operand for operand in operands[:2] if not re.fullmatch(r"U?P\w+", operand)]  # predicates come first
    if not results or not (first := re.fullmatch(r"R(\d+)[.\w]*", results[0])):
        return frozenset()
    suffixes = operation.split(".")[1:]
    if product := re.match(r"HGMMA\.64x(\d+)x", operation):
        count = int(product[1]) // (2 if "F32" in suffixes else 4)
    elif operation.startswith(("HMMA", "IMMA")) or {"128", "4", "M88", "MT88"} & set(suffixes):
        count = 4
    else:
        count = 2 if {"64", "WIDE", "F64", "2"} & set(suffixes) or operation.startswith("D") else 1
    return frozenset(range(int(first[1]), int(first[1]) + count))


def overwritten_operands(sass):
    """(address of an HGMMA, address of what writes a register that it may still have to read), as ints.

    wgmma reads an operand that lies in registers while other instructions run, until a wait covers it
    (WARPGROUP.DEPBAR). ptxas up to CUDA 13.2 may give such a register away before (triton-lang/triton issue 11781):
    every path from each HGMMA to such a wait is followed.
    """
    found = INSTRUCTION.findall(sass)
    code = [
        (int(address, 16), bool(guard.strip("@ PTU")), operation, [o.strip() for o in operands.split(",")])
        for address, guard, operation, operands in found
    ]
    place = {address: index for index, (address, *_) in enumerate(code)}
    hazards = []
    for start, (address, _, operation, operands) in enumerate(code):
        if not operation.startswith("HGMMA") or not (first := re.fullmatch(r"R(\d+)[.\w]*", operands[1])):
            continue
        own = frozenset(range(int(first[1]), int(first[1]) + 4))
        seen, paths = set(), [(start, 0)]  # where a path has come to, and how many groups of products it has closed
        while paths:
            at, groups = step = paths.pop()
            if step in seen or at == len(code):
                continue
            seen.add(step)
            there, guarded, operation, operands = code[at]
            if at != start and own & _written(operation, operands):
                hazards.append((address, there))
                continue
            if operation.startswith("HGMMA") and "gsb0" in operands:
                groups = min(groups + 1, 9)
            if operation.startswith("WARPGROUP.DEPBAR") and groups > int(operands[-1], 0):
                continue
            ends = operation.startswith("EXIT") and not guarded
            if operation.startswith("BRA") and (to := re.search(r"0x([0-9a-f]+)", operands[-1])):
                paths.append((place[int(to[1], 16)], groups))
                ends = not guarded and len(operands) == 1
            if not ends:
                paths.append((at + 1, groups))
    return hazards
