# SPDX-License-Identifier: Apache-2.0
"""What tests change of triton's interpreter: it rounds as the hardware does, and takes half the time.

Its private functions are meant by name: a triton that has them no more fails every test of a kernel.
"""

import functools

import numpy as np
import torch


def round_bfloat16(monkeypatch):
    # The interpreter cuts the low half of an fp32 off where the hardware rounds to nearest. In a layer of a few
    # elements a cut y alone moves y (1 - y) by 2 %: an allowance for that would let wrong results pass in all others.
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding_convert(input, input_dtype, output_dtype, rounding_mode):
        if input_dtype == tl.float32 and output_dtype == tl.bfloat16:
            return torch.tensor(input).to(torch.bfloat16).view(torch.uint16).numpy()
        return convert(input, input_dtype, output_dtype, rounding_mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounding_convert)


def patch_language_once(monkeypatch):
    # The interpreter puts its own functions in the place of the language's at each call of a function by a kernel,
    # which the launch has done already: a third of all its time. Modules that it has not reached still get theirs.
    import triton.language as tl
    from triton.runtime import interpreter

    patch = interpreter._patch_lang

    @functools.cache
    def languages(fn):
        seen = {id(value) for value in fn.__globals__.values()}
        return [module for module in (tl, tl.core) if id(module) in seen]

    def patch_what_is_not(fn):
        return patch(fn) if any(tl.core.is_builtin(module.arange) for module in languages(fn)) else None

    monkeypatch.setattr(interpreter, "_patch_lang", patch_what_is_not)


def find_overflow_by_numpy(monkeypatch):
    # The interpreter computes each sum and product of integers once more, in 64 bits, by dozens of its own operations,
    # and does nothing with what it finds: offsets that do not fit are to fail a test.
    from triton.language import semantic

    def check(self, lhs, rhs, operation):
        kind = lhs.type.scalar
        if kind.int_bitwidth >= 64:
            return
        exact = getattr(np, NUMPY[operation.__name__])(*(side.handle.data.astype(np.int64) for side in (lhs, rhs)))
        low, high = kind.get_int_min_value(), kind.get_int_max_value()
        if exact.size and not low <= exact.min() <= exact.max() <= high:
            raise AssertionError(f"int{kind.int_bitwidth} overflow detected for operation {operation.__name__}")

    monkeypatch.setattr(semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", check)


def let_integers_wrap(monkeypatch):
    """For a kernel that means it, as where it adds to the bits of a NaN."""
    from triton.language import semantic

    monkeypatch.setattr(semantic.TritonSemantic, "binary_op_sanitize_overflow_impl", lambda *_: None)


NUMPY = {"add": "add", "sub": "subtract", "mul": "multiply"}
