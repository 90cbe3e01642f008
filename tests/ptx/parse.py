# SPDX-License-Identifier: Apache-2.0
"""The text of a PTX module with one entry, as registers, parameters and basic blocks (PTX ISA, "Syntax")."""

import functools
import itertools
import re
from dataclasses import dataclass, field

SIZES = {f"{kind}{8 * size}": size for kind in "bus" for size in (1, 2, 4, 8)}  # bytes
SIZES |= {"f16": 2, "bf16": 2, "f32": 4, "tf32": 4, "f64": 8}
SIZES |= {f"{kind}x2": 2 * SIZES[kind] for kind in ("f16", "bf16", "u16", "s16", "f32")}
# Where a block ends, besides its branches: threads of a CTA wait for each other, or for an mbarrier.
WAITS = ("bar.sync", "barrier.", "bar.red", "bar.arrive", "mbarrier.try_wait", "mbarrier.test_wait")
KNOWN_WAITS = r"bar\.sync|barrier\.sync(\.aligned)?|mbarrier\.(try|test)_wait\.parity(\.acquire\.cta)?\.shared\S*\.b64"


class EmulationError(Exception):
    """A program does what no program may, or what this emulator does not know."""


@dataclass(frozen=True)
class Address:
    """[base + offset], with the coordinates of a tensor where there are some."""

    base: str
    offset: int
    coordinates: tuple = ()


@dataclass
class Instruction:
    op: str  # with all modifiers, as in "setp.lt.s32"
    operands: list  # a name or number as written, a list of those for a vector, or an Address
    predicate: str | None
    negated: bool
    line: int
    text: str

    @property
    def parts(self):
        return self.op.split(".")

    @property
    def type(self):
        """The last modifier, which is the type of the operands."""
        return self.parts[-1]

    def has(self, *modifiers):
        return not set(modifiers).isdisjoint(self.parts)

    def unknown(self):
        return NotImplementedError(f"line {self.line}: {self.text}")


@dataclass
class Block:
    """Instructions without a branch or wait among them, and what comes after: None falls through."""

    instructions: list = field(default_factory=list)
    end: Instruction | None = None
    targets: list = field(default_factory=list)  # indices of blocks


@dataclass
class Entry:
    name: str
    parameters: list  # (name, size, offset)
    threads: int
    registers: dict  # name -> (index, type)
    blocks: list
    shared: dict  # symbol -> bytes, 0 for what the launch decides
    lines: list


def parse(text):
    """The entry of a module; raises EmulationError for directives that are unknown here."""
    plain = re.sub(r"//[^\n]*", "", text)
    plain = re.sub(r"/\*.*?\*/", lambda comment: "\n" * comment[0].count("\n"), plain, flags=re.DOTALL)
    plain = re.sub(r"(?m)^[ \t]*\.(loc|file)\b[^\n]*$", "", plain)
    head = re.search(r"\.entry\s+([\w$]+)\s*\((.*?)\)([^{]*)\{", plain, flags=re.DOTALL)
    threads = int(re.search(r"\.reqntid\s+(\d+)", head[3])[1])
    shared = {m[1]: int(m[2] or 0) for m in re.finditer(SHARED, plain)}
    registers, blocks = _blocks(_statements(plain, head.end()))
    return Entry(head[1], _parameters(head[2]), threads, registers, blocks, shared, text.splitlines())


SHARED = r"\.shared\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d*)\]"


def _parameters(text):
    found, offset = [], 0
    for parameter in filter(None, map(str.strip, text.split(","))):
        if array := re.search(r"\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", parameter):
            alignment, name, size = int(array[1]), array[2], int(array[3])
        else:
            alignment = size = SIZES[re.search(r"\.param\s+\.(\w+)", parameter)[1]]
            name = parameter.split()[-1]
        offset = -(-offset // alignment) * alignment
        found.append((name, size, offset))
        offset += size
    return found


def _statements(plain, at):
    """(text, scopes, line) of each statement, scopes as numbers from the outermost. Labels end in a colon."""
    scopes, numbers = (0,), itertools.count(1)
    gap, label = re.compile(r"[\s;]*"), re.compile(r"[\w$]+\s*:(?!:)")
    while True:
        at = gap.match(plain, at).end()
        line = plain.count("\n", 0, at) + 1
        if plain[at] in "{}":
            scopes = (*scopes, next(numbers)) if plain[at] == "{" else scopes[:-1]
            at += 1
            if not scopes:
                return
        elif named := label.match(plain, at):
            yield re.sub(r"\s", "", named[0]), scopes, line
            at = named.end()
        else:
            end = plain.index(";", at)
            yield " ".join(plain[at:end].split()), scopes, line
            at = end + 1


def _blocks(statements):
    registers, tables, body = {}, {}, []
    declared = set()  # (name, scope): an inner scope may use a name again, which then stands for another thing
    for text, scopes, line in statements:
        if text.startswith(".reg"):
            _, kind, names = text.split(None, 2)
            for name in map(str.strip, names.split(",")):
                many = re.fullmatch(r"(%?[\w$]+)<(\d+)>", name)
                for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                    declared.add((each, scopes[-1]))
                    registers[_unique(each, scopes, declared)] = (len(registers), kind[1:])
        elif text.startswith(".branchtargets"):
            tables[body.pop()[0][:-1]] = list(map(str.strip, text.split(None, 1)[1].split(",")))
        elif text.startswith(".") and not text.startswith((".pragma", ".shared")):
            raise EmulationError(f"line {line}: unknown directive: {text}")
        elif not text.startswith("."):
            if text.endswith(":"):
                declared.add((text[:-1], scopes[-1]))
            body.append((text, scopes, line))

    def resolved(text, scopes, line):
        unique = functools.partial(_unique, scopes=scopes, declared=declared)
        return unique(text[:-1]) if text.endswith(":") else _instruction(text, line, unique)

    body = [resolved(*statement) for statement in body]
    branches = [own for own in body if isinstance(own, Instruction) and own.parts[0] == "bra"]
    aims = {own.operands[0] for own in branches}.union(*tables.values())
    blocks, labels = [Block()], {}
    for own in body:
        if isinstance(own, str):
            if own in aims:
                if blocks[-1].instructions:
                    blocks.append(Block())
                labels[own] = len(blocks) - 1
        elif own.parts[0] in ("bra", "brx", "ret", "exit") or own.op.startswith(WAITS):
            if own.op.startswith(WAITS) and not re.fullmatch(KNOWN_WAITS, own.op):
                raise own.unknown()
            blocks[-1].end = own
            blocks.append(Block())
        else:
            blocks[-1].instructions.append(own)
    for block in blocks:
        if block.end and block.end.parts[0] == "bra":
            block.targets = [labels[block.end.operands[0]]]
        elif block.end and block.end.parts[0] == "brx":
            block.targets = [labels[name] for name in tables[block.end.operands[1]]]
    return registers, blocks


def _unique(name, scopes, declared):
    """The name, told apart from those of other scopes."""
    if "|" in name:
        return "|".join(_unique(half, scopes, declared) for half in name.split("|"))
    scope = next((scope for scope in reversed(scopes) if (name.lstrip("!"), scope) in declared), 0)
    return f"{name}@{scope}" if scope else name


def _instruction(text, line, unique):
    match = re.match(r"(?:@(!?)([%\w$]+)\s+)?([\w.:]+)\s*(.*)$", text)
    operands = [_operand(operand, unique) for operand in _split(match[4])]
    return Instruction(match[3], operands, match[2] and unique(match[2]), match[1] == "!", line, text)


def _operand(text, unique):
    if text.startswith("{"):
        return [_operand(each, unique) for each in _split(text[1:-1])]
    if not text.startswith("["):
        return unique(text)
    base, *coordinates = _split(text[1:-1])
    offset = re.fullmatch(r"(.+?)\s*\+\s*(-?\w+)", base)
    inside = tuple(unique(each) for each in _split(coordinates[0][1:-1])) if coordinates else ()
    return Address(unique(offset[1] if offset else base), int(offset[2], 0) if offset else 0, inside)


def _split(text):
    """At the commas that stand in no bracket."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]
