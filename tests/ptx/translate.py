# SPDX-License-Identifier: Apache-2.0
"""Instructions as functions of a batch of threads: where operands come from, and where results go.

Each module of instructions registers, by the first word of an instruction, what makes that function. It takes the
batch and a mask, None where all of its threads take part, and is not called where none does.
"""

import functools
import hashlib
import re
import struct

import numpy as np

from .arithmetic import bits_of, decoder, encoder, flushed
from .parse import SIZES, Address, EmulationError, parse

SHARED_BASE = 1024  # the first KB of shared memory is the system's
PARAMETER_BASE = 0x7FF000000000  # no memory of this process lies there; the lower 32 bits are 0
MAKERS = {}


SPECIAL = {f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"} | {"%laneid", "%warpid"}


def instruction(*heads, form=".*"):
    """form: a pattern of the whole instruction with its modifiers, for makers that do not look at each of them."""

    def register(maker):
        MAKERS.update(dict.fromkeys(heads, (maker, re.compile(form))))
        return maker

    return register


class Program:
    """An entry whose blocks become lists of functions when they first run."""

    def __init__(self, text, dynamic_shared):
        self.entry = parse(text)
        self.registers = self.entry.registers
        self.symbols, end = {}, SHARED_BASE
        for name, size in sorted(self.entry.shared.items(), key=lambda symbol: symbol[1] == 0):
            self.symbols[name] = end
            end += -(-size // 128) * 128
        self.shared_end = end + dynamic_shared
        self.code = {}
        self.parameters = {name: offset for name, _, offset in self.entry.parameters}
        self.parameter_bytes = max((offset + size for _, size, offset in self.entry.parameters), default=0)

    def block(self, index):
        """(predicate's register or None, whether it is negated, function) of each instruction."""
        if index not in self.code:
            self.code[index] = [self.translated(own) for own in self.entry.blocks[index].instructions]
        return self.code[index]

    def repeats(self, index):
        """Whether what follows a block is nothing but a branch back to it, as after a try_wait."""
        after = self.entry.blocks[index + 1]
        back = after.end is not None and after.end.parts[0] == "bra" and after.targets[0] <= index
        return back and not after.instructions

    def translated(self, own):
        heads = [".".join(own.parts[:count]) for count in (3, 2, 1)]
        maker, form = next((MAKERS[head] for head in heads if head in MAKERS), (None, None))
        if maker is None or not form.fullmatch(own.op):
            raise own.unknown()
        try:
            run = maker(self, own)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise own.unknown() from error
        return None if own.predicate is None else self.registers[own.predicate][0], own.negated, run


@functools.lru_cache(maxsize=128)
def _program(digest, text, dynamic_shared):
    return Program(text, dynamic_shared)


def program(text, dynamic_shared):
    return _program(hashlib.sha256(text.encode()).digest(), text, dynamic_shared)


def source(program, name, kind):
    """A function of the batch: an operand as numbers of that type."""
    if name.startswith("!"):
        inner = source(program, name[1:], kind)
        return lambda batch: ~inner(batch)
    decode, bits = decoder(kind), bits_of(kind)
    if name in program.registers:
        index, have = program.registers[name]
        if bits_of(have) == bits:
            return (lambda batch: decode(batch.registers[index])) if decode else lambda batch: batch.registers[index]
        if bits_of(have).itemsize < bits.itemsize or bits.kind == "b":
            raise ValueError(name)
        narrow = lambda batch: batch.registers[index].astype(bits)  # noqa: E731
        return (lambda batch: decode(narrow(batch))) if decode else narrow
    if name in SPECIAL:
        return lambda batch: batch.special[name].astype(bits, copy=False)
    constant = constant_of(program, name, kind)
    return lambda batch: constant


def constant_of(program, name, kind):
    bits = bits_of(kind)
    if name in program.symbols:
        value = program.symbols[name]
    elif name in program.parameters:
        value = PARAMETER_BASE + program.parameters[name]
    elif name.startswith(("0f", "0d")):
        (number,) = struct.unpack(">" + ("f" if name[1] == "f" else "d"), bytes.fromhex(name[2:]))
        if kind[0] == "f" and 8 * bits.itemsize != {"f": 32, "d": 64}[name[1]]:
            raise ValueError(name)
        value = int(name[2:], 16)
        if kind == "f64" or (kind == "f32" and np.isfinite(number)):
            return np.array([number], f"f{bits.itemsize}")
    else:
        value = int(name.rstrip("U"), 0)
    if kind == "pred":
        return np.array([value != 0])
    raw = np.array([value & ((1 << 8 * bits.itemsize) - 1)], bits)
    decode = decoder(kind)
    return decode(raw) if decode else raw


def destination(program, name, kind):
    """A function of the batch, numbers of that type and a mask. A wider register is filled with their sign or zeros."""
    if name == "_":
        return lambda batch, numbers, mask: None
    index, have = program.registers[name]
    encode, wide = encoder(kind), bits_of(have)
    if wide != bits_of(kind):
        if kind == "pred" or wide.itemsize < SIZES[kind]:
            raise ValueError(name)
        narrow, signed = encode, f"i{wide.itemsize}"
        extended = (lambda x: x.astype(signed).view(wide)), (lambda x: narrow(x).astype(wide))
        encode = extended[kind[0] != "s"]

    def write(batch, numbers, mask):
        bits = encode(numbers)
        registers = batch.registers
        registers[index] = bits if mask is None else np.where(mask, bits, registers[index])

    return write


def elementwise(program, own, formula, sources, result, to=None):
    """The instruction that writes formula(*sources); sources are (operand, type), the result's type is `to`."""
    if own.has("ftz"):
        formula = _with_flushed(formula)
    if own.has("sat"):
        formula = _within_one(formula)
    kind = to or sources[0][1]
    if kind.endswith("x2"):
        return _packed(program, formula, [name for name, _ in sources], result, kind[:-2])
    reads = [source(program, name, of) for name, of in sources]
    write = destination(program, result, kind)
    if len(reads) == 1:
        (a,) = reads
        return lambda batch, mask: write(batch, formula(a(batch)), mask)
    if len(reads) == 2:
        a, b = reads
        return lambda batch, mask: write(batch, formula(a(batch), b(batch)), mask)
    return lambda batch, mask: write(batch, formula(*[read(batch) for read in reads]), mask)


def _with_flushed(formula):
    return lambda *numbers: flushed(formula(*map(flushed, numbers)))


def _within_one(formula):
    return lambda *numbers: np.nan_to_num(np.clip(formula(*numbers), 0, 1), nan=0.0)


def _packed(program, formula, names, result, kind):
    """The formula on both halves of a register."""
    whole, shift = f"b{16 * SIZES[kind]}", 8 * SIZES[kind]
    reads = [source(program, name, whole) for name in names]
    write, encode = destination(program, result, whole), encoder(kind)
    bits, half = bits_of(whole), bits_of(kind)
    decode = decoder(kind) or (lambda bits: bits)

    def run(batch, mask):
        both = [read(batch) for read in reads]
        low, high = (
            encode(formula(*[decode((own >> bits.type(place)).astype(half)) for own in both])).astype(bits)
            for place in (0, shift)
        )
        write(batch, low | (high << bits.type(shift)), mask)

    return run


def address(program, operand):
    """A function of the batch: addresses, of shared memory in 32 bits."""
    if not isinstance(operand, Address):
        raise EmulationError(f"not an address: {operand}")
    base = operand.base
    if base in program.registers:
        index, kind = program.registers[base]
        bits = bits_of(kind)
        if not operand.offset:
            return lambda batch: batch.registers[index]
        offset = np.array([operand.offset & ((1 << 8 * bits.itemsize) - 1)], bits)
        return lambda batch: batch.registers[index] + offset
    kind = "b64" if base in program.parameters else "b32"
    constant = constant_of(program, base, kind)
    constant = constant + np.array([operand.offset & 0xFFFFFFFF], constant.dtype)
    return lambda batch: constant


def vector(operand):
    return operand if isinstance(operand, list) else [operand]
