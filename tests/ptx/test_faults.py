# SPDX-License-Identifier: Apache-2.0
"""Every barrier, wait, fence, arrival and mask of two products is deleted, one at a time: the emulator must notice.

Noticed is what it reports, or what makes the result wrong. What may be missing is listed with the reason.
"""

import os
import re

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    pytest.skip("TRITON_INTERPRET is set, which compiles nothing", allow_module_level=True)

import triton

from perceptriton.kernels import devices
from perceptriton.kernels.records import Plan, WideTile

from . import driver, kernels
from .parse import EmulationError

REASON = "what may be missing depends on what triton compiles: known of 3.7"
pytestmark = [pytest.mark.emulated, pytest.mark.skipif(not triton.__version__.startswith("3.7."), reason=REASON)]

LINES = {
    "bar.sync": r"bar\.sync",
    "cp.async.commit_group": r"cp\.async\.commit_group",
    "cp.async.wait_group": r"cp\.async\.wait_group",
    "wgmma.fence": r"wgmma\.fence",
    "wgmma.commit_group": r"wgmma\.commit_group",
    "wgmma.wait_group": r"wgmma\.wait_group",
    "fence.proxy.async": r"fence\.proxy\.async",
    "mbarrier.init": r"@%p\d+ mbarrier\.init",
    "mbarrier.arrive.expect_tx": r"@%p\d+ mbarrier\.arrive\.expect_tx",
    "mbarrier wait": r"@!complete bra\.uni waitLoop",
    "cp.async.bulk.commit_group": r"cp\.async\.bulk\.commit_group",
    "cp.async.bulk.wait_group": r"cp\.async\.bulk\.wait_group",
}
LINES = {name: rf"^[ \t]*{start}[^\n]*\n" for name, start in LINES.items()}
MASKS = {
    "of loads": r"@%p\d+ (?=ld\.global)",
    "of stores": r"@%p\d+ (?=st\.global)",
    "of copies": r"(?<=, 0x10), %r\d+(?=;)",  # the number of bytes that are read: 0 or all
}


def noticed(right):
    """Whether a launch is reported, or its result is not `right`."""
    try:
        return not right()
    except EmulationError:
        return True


def unnoticed(monkeypatch, launched, right, patterns):
    """({name: how many there are}, (name, n) of those whose deletion nobody notices)."""
    assert right()
    text = "\n".join(launched[-1].program.entry.lines)
    found = {name: list(re.finditer(pattern, text, re.MULTILINE)) for name, pattern in patterns.items()}
    missed = set()
    for name, matches in found.items():
        for n, match in enumerate(matches):
            without = text[: match.start()] + text[match.end() :]
            with monkeypatch.context() as patch:
                patch.setattr(driver, "edit", lambda _, without=without: without)
                if not noticed(right):
                    missed.add((name, n))
            launched.clear()
    return {name: len(matches) for name, matches in found.items() if matches}, missed


def product(shape, tile, stages):
    """A function that says whether the emulated product is right. Between rows there is memory, with NaN in it."""
    (m, n, k), (block_m, block_n, _) = shape, tile
    a, b, c = (torch.full(size, torch.nan, dtype=torch.bfloat16) for size in ((m, k + 16), (k, n + 16), (m, n)))
    a, b, c = a[:, :k].copy_(torch.randn(m, k)), b[:, :n].copy_(torch.randn(k, n)), c.float()
    exact = a.double() @ b.double()
    grid = triton.cdiv(m, block_m), triton.cdiv(n, block_n)

    def right():
        c.fill_(torch.nan)
        sizes = (m, n, k, *a.stride(), *b.stride())
        kernels.matmul_kernel[grid](a, b, c, *sizes, "ieee", *tile, stages, num_warps=4)
        return (c - exact).norm() < 1e-6 * exact.norm()

    return right


# What a product of 1 and of 3 stages has on each chip.
WARPGROUPS = {"wgmma.fence": 1, "wgmma.commit_group": 1, "wgmma.wait_group": 1, "fence.proxy.async": 1}
COPIES = {"cp.async.commit_group": 6, "cp.async.wait_group": 2}
PRODUCTS = {
    (80, 1): {"bar.sync": 6},
    (90, 1): {"bar.sync": 4, **WARPGROUPS},
    (80, 3): {"bar.sync": 7, **COPIES},
    (90, 3): {"bar.sync": 5, **COPIES, **WARPGROUPS, "wgmma.wait_group": 2},
}
REDUNDANT = {
    1: {},
    3: {
        ("bar.sync", 0): "the copies behind it write where nobody has read or written yet",
        ("cp.async.commit_group", 0): "the first copies of A join those of B, and both are waited for together",
    },
}


@pytest.mark.parametrize("stages", [1, 3])
def test_lines_of_a_product(chip, launched, monkeypatch, stages):
    right = product((112, 80, 144), (64, 64, 32), stages)
    assert unnoticed(monkeypatch, launched, right, LINES) == (PRODUCTS[chip, stages], set(REDUNDANT[stages]))


# Sizes that each need some of the masks, and together all of them: every step along K of a pipeline has its own.
SIZES = {
    1: [((40, 40, 33), (32, 32, 32), {"of loads": 16, "of stores": 8})],
    3: [((80, 80, k), (64, 64, 32), {"of stores": 8, "of copies": 12}) for k in (16, 48, 144)],
}


@pytest.mark.parametrize("stages", SIZES)
def test_masks_of_a_product(chip, launched, monkeypatch, stages):
    missed = []
    for shape, tile, count in SIZES[stages]:
        found, missing = unnoticed(monkeypatch, launched, product(shape, tile, stages), MASKS)
        assert found == count
        missed.append(missing)
    assert set.intersection(*missed) == set()


# The project's own product by TMA. One program computes two tiles of the result, with four steps along K.
LOADS = {
    "wgmma.fence": 1,
    "wgmma.commit_group": 1,
    "wgmma.wait_group": 2,
    "mbarrier.init": 3,
    "mbarrier.arrive.expect_tx": 3,
    "mbarrier wait": 1,
}


def stores(count):
    return {"fence.proxy.async": count, "cp.async.bulk.commit_group": count, "cp.async.bulk.wait_group": count + 1}


def idle(*numbers):
    """The barriers that may be missing, in the order of the code."""
    before, *loads, after, between, end = [("bar.sync", n) for n in numbers]
    return {
        before: "all have waited for the mbarriers that it lets go, and met since",
        **dict.fromkeys(loads, "the warp that starts the copies has initialized the mbarriers, others meet later"),
        after: "everybody has waited for the mbarrier in front of it",
        between: "the barrier in front of the copy of A is one for that of B",
        end: "nobody does anything behind it",
    }


WIDE = {
    "whole": (
        WideTile(64, 64, 64, 4, 3),
        {"bar.sync": 12, **LOADS, **stores(1)},
        idle(0, 3, 4, 5, 6, 7, 8, 10, 11),
    ),
    "halves": (
        WideTile(64, 64, 64, 4, 3, subtiles=2),
        {"bar.sync": 14, **LOADS, **stores(2)},
        idle(0, 5, 6, 7, 8, 9, 10, 12, 13),
    ),
}


@pytest.mark.parametrize(("tile", "count", "redundant"), WIDE.values(), ids=WIDE)
def test_lines_of_a_product_by_tma(hopper, launched, monkeypatch, tile, count, redundant):
    wide = devices.gpu("wide")
    m, n, k = 2 * tile.block_m - 9, tile.block_n - 40, 200
    x, weight, bias = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16() / 10, torch.randn(n).bfloat16()
    exact = torch.sigmoid(x.double() @ weight.double().t() + bias.double())

    def right():
        y = wide.linear_act_fwd(x, weight, bias, "sigmoid", Plan("tma", "", tile, 1, "ieee"))
        return (y - exact).norm() < 4e-3 * exact.norm()

    assert unnoticed(monkeypatch, launched, right, LINES) == (count, set(redundant))
