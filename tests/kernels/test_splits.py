# SPDX-License-Identifier: Apache-2.0
"""The kernels' fp32 arithmetic against fp64: errors that docs/precision.md lists, by emulation."""

import functools
import re
from pathlib import Path

import pytest
import torch
from cases import FLOOR, relative_error
from emulation import product, sigmoid

from perceptriton.kernels.records import SPLITS

KS = (1, 32, 1024, 8192, 32768)
KINDS = ("tf32x3", "bf16x6", "bf16x3", "tf32")
LIKE_FP32 = ("tf32x3", "bf16x6")


@functools.cache
def layer(k):
    """x, weight and the exact x @ weight.T, of order 1."""
    generator = torch.Generator().manual_seed(k)
    x = torch.randn(64, k, generator=generator)
    weight = 1.4 * torch.randn(64, k, generator=generator) / k**0.5
    return x, weight, x.double() @ weight.double().t()


@functools.cache
def error(k, kind):
    x, weight, exact = layer(k)
    return relative_error(x @ weight.t() if kind == "torch" else product(x, weight, kind), exact)


@pytest.mark.parametrize("kind", LIKE_FP32)
@pytest.mark.parametrize("k", KS)
def test_errors_like_fp32(k, kind):
    assert error(k, kind) <= 2 * error(k, "torch") + FLOOR[torch.float32]


@pytest.mark.parametrize("k", KS)
def test_shorter_products_are_not_fp32(k):
    # Negative control, and the reason why they are never presented as fp32.
    for kind, low, high in (("bf16x3", 2e-6, 1e-5), ("tf32", 2e-4, 5e-4)):
        assert low + 2 * error(k, "torch") < error(k, kind) < high


@pytest.mark.parametrize("k", KS)
def test_values_from_1e_30_to_1e30(k):
    generator = torch.Generator().manual_seed(0)
    x = 10 ** (60 * torch.rand(64, k, generator=generator) - 30) * torch.randn(64, k, generator=generator).sign()
    weight = torch.randn(64, k, generator=generator)
    exact = x.double() @ weight.double().t()
    # Against the sum of magnitudes: where values cancel, fp32 too keeps nothing of what is left.
    scale = x.double().abs() @ weight.double().abs().t()

    def worst(z):
        return ((z - exact).abs() / scale).max().item()

    assert worst(x @ weight.t()) < 1e-6
    for kind in LIKE_FP32:
        assert worst(product(x, weight, kind)) < 1e-6, kind
    assert worst(product(x, weight, "bf16x3")) < 5e-5


# v, and from which finite magnitude on a kind of product takes it for inf
LARGEST = {"tf32x3": 3.4019e38, "bf16x6": 3.3961e38, "bf16x3": 3.3961e38}


@pytest.mark.parametrize("kind", SPLITS)
def test_inf_and_nan_as_in_fp32(kind):
    weight = torch.tensor([[0.5, 1.0], [0.0, 1.0], [-0.5, 1.0], [1e-30, 1.0], [torch.inf, 1.0]])
    for v in (torch.inf, -torch.inf, torch.nan, LARGEST[kind]):
        x = torch.tensor([[v, 2.0], [1.0, 2.0]])
        actual, expected = product(x, weight, kind), x @ weight.t()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0.0, equal_nan=True, msg=f"{v}: {{}}".format)


@pytest.mark.parametrize("kind", SPLITS)
def test_the_last_numbers_before_infinity_are_taken_for_it(kind):
    # What is documented as a difference from fp32: the highest part rounds up to inf.
    x, weight = torch.tensor([[1.0002 * LARGEST[kind], 2.0]]), torch.tensor([[0.5, 1.0]])
    assert (x @ weight.t()).isfinite().all()
    assert product(x, weight, kind).isinf().all()


@pytest.mark.parametrize(("kind", "full", "low"), [("tf32x3", 1e-33, 1e-3), ("bf16x6", 1e-33, 5e-3)])
def test_tiny_values_lose_their_low_parts(kind, full, low):
    # bf16 and tf32 have fp32's exponents and fewer bits: what lies below the smallest subnormal is gone.
    def worst(smallest):
        x = smallest * torch.linspace(1, 9, 97)[:, None]
        weight = torch.full((1, 1), 1e10)
        return ((product(x, weight, kind) / (x.double() * 1e10)) - 1).abs().max().item()

    assert worst(full) < 1e-6
    assert 1e-5 < worst(2e-38) < low


def test_interpreted_products_are_fp32():
    # The emulation of plain products is torch's own sum, up to the order.
    for k in KS:
        assert error(k, "ieee") <= 2 * error(k, "torch") + 1e-7


def test_the_page_on_precision_lists_these_errors():
    text = (Path(__file__).parents[2] / "docs" / "precision.md").read_text()
    rows = dict(re.findall(r"^ *\| `?(fp32|tf32x3|bf16x6|bf16x3|tf32)`?[^|]*\|((?:[^|\n]*\|)+)$", text, re.M))
    assert set(rows) == {"fp32", *KINDS}
    for kind, cells in rows.items():
        listed = [float(cell) for cell in re.findall(r"\d\.\de-\d+", cells)]
        assert len(listed) == len(KS), f"{kind}: {cells}"
        for k, number in zip(KS, listed, strict=True):
            found = error(k, "torch" if kind == "fp32" else kind)
            # Another CPU sums in another order.
            assert found / 2.5 <= number <= 2.5 * found, f"{kind}, K {k}: page {number}, here {found:.1e}"


# Relative errors of `exp2` and `rsqrt` before rounding. The documented ones are 2 ulp and 2^-22.9.
FUNCTIONS = {
    "exact functions": ((0, 0),),
    "documented errors": ((2**-22, -(2**-22.9)), (-(2**-22), 2**-22.9)),
}


@pytest.mark.parametrize("functions", FUNCTIONS)
def test_the_page_on_precision_bounds_the_sigmoid(functions):
    text = (Path(__file__).parents[2] / "docs" / "precision.md").read_text()
    (header,) = re.findall(r"^ *\| largest error (.*)\|$", text, re.M)
    (row,) = re.findall(rf"^ *\| {functions} (.*)\|$", text, re.M)
    absolute, *bounds = (2 ** float(power) for power in re.findall(r"2\^(-[\d.]+)", row))
    ends = [float(end) for end in re.findall(r"from (-?\d+)", header)]
    assert ends == [0, -1, -10, -20, -87]
    z = torch.linspace(-87, 87, 1 << 20)
    exact = torch.sigmoid(z.double())
    error = torch.stack([(sigmoid(z, *errors).double() - exact).abs() for errors in FUNCTIONS[functions]]).amax(0)
    assert absolute / 1.2 < error.max() <= absolute
    for end, bound in zip(ends, bounds, strict=True):
        worst = (error / exact)[z >= end].max()
        assert bound / 1.2 < worst <= bound, end
