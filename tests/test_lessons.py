"""The lessons reproduce their tables, and their pictures show what was computed."""

import dataclasses
import errno
import json
import math
import sys

import pytest
import torch

from perceptriton.kernels import explain
from perceptriton.mlp import lessons, plotting

# The largest difference between nine ways of rounding the same 10,001 steps, relative.
BAND = 6e-5
TABLE = json.loads((lessons.REFERENCE / "xor_2-2-1.json").read_text())


@pytest.fixture(scope="module")
def xor():
    return lessons.xor()


@pytest.fixture(scope="module")
def short():
    return lessons.xor(301)


@pytest.fixture
def figure():
    return pytest.importorskip("matplotlib.figure").Figure(figsize=(1, 1))


def test_xor_follows_the_table(xor):
    assert xor.steps == list(range(0, 10_001, 100))
    for losses in (xor.losses, xor.nn_losses):
        for (step, reference), loss in zip(TABLE["loss"], losses, strict=True):
            assert abs(loss - reference) <= BAND * reference, f"step {step}: {loss} instead of {reference}"
    assert xor.matches
    assert xor.reference == [reference for _, reference in TABLE["loss"]]
    assert xor.largest_difference == max(xor.differences)
    assert xor.differences[xor.steps.index(xor.largest_difference_step)] == xor.largest_difference


def test_xor_predicts_the_table(xor):
    assert xor.predictions == pytest.approx(TABLE["prediction"], rel=1e-4)
    assert [int(p > 0.5) for p in xor.predictions] == TABLE["predicted_class"] == xor.targets
    assert xor.accuracy == TABLE["accuracy"] == 1
    x = torch.tensor(xor.inputs, dtype=torch.float32)
    assert xor.model(x).flatten().tolist() == xor.predictions


def test_another_seed_does_not_match():
    other = lessons.xor(101, seed=778)
    assert not other.matches
    assert other.largest_difference > 100 * BAND


@pytest.mark.parametrize("wrong", [1 + 2 * BAND, math.nan], ids=["twice-the-band", "nan"])
def test_one_wrong_loss_does_not_match(xor, wrong):
    losses = list(xor.losses)
    losses[50] *= wrong
    spoilt = dataclasses.replace(xor, losses=losses)
    assert not spoilt.matches
    assert spoilt.largest_difference_step == 5000


def test_steps_beyond_the_table_are_not_compared(xor):
    longer = dataclasses.replace(
        xor, steps=[*xor.steps, 10_100], losses=[*xor.losses, 1.0], reference=[*xor.reference, None]
    )
    assert longer.matches
    assert longer.differences == xor.differences


def test_xor_names_the_implementation_of_each_layer(xor):
    assert xor.explanation == explain((4, 2), [(2, 2), (1, 2)])


def test_xor_times_both_loops(xor):
    for seconds, us_per_step in ((xor.seconds, xor.us_per_step), (xor.nn_seconds, xor.nn_us_per_step)):
        # The same steps by two measures: only the units and outliers lie between them.
        assert 0.1 < us_per_step * 10_001 / (seconds * 1e6) < 2
    assert 0.2 < xor.ratio < 5


def test_xor_stops_between_logged_steps(short):
    assert lessons.xor(250).steps == [0, 100, 200]
    assert short.steps == [0, 100, 200, 300]
    assert short.matches
    assert lessons.xor(1).losses == short.losses[:1]


def test_xor_leaves_random_numbers_alone():
    before = torch.get_rng_state()
    lessons.xor(1)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("steps", [0, -1])
def test_xor_refuses_no_steps(steps):
    with pytest.raises(ValueError, match=f"at least 1, not {steps}"):
        lessons.xor(steps)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_xor_on_cuda():
    result = lessons.xor(2001, "cuda")
    assert result.matches, f"{result.largest_difference} at step {result.largest_difference_step}"
    assert next(result.model.parameters()).is_cuda


# --- pictures ----------------------------------------------------------------------------------------------


def test_xor_picture_shows_the_result(xor):
    pytest.importorskip("matplotlib")
    figure, data = plotting.plot_xor(xor)
    assert data.steps.tolist() == data.reference_steps.tolist() == xor.steps
    assert data.losses.tolist() == xor.losses
    assert data.reference_losses.tolist() == xor.reference

    assert (data.axis[0], data.axis[50], data.axis[150], data.axis[-1]) == (-0.5, 0, 1, 1.5)
    place = {0: 50, 1: 150}
    at_inputs = [data.probability[place[x2], place[x1]] for x1, x2 in xor.inputs]
    assert at_inputs == pytest.approx(xor.predictions, rel=1e-5)
    # Not symmetric: rows are x2, columns x1.
    with torch.no_grad():
        p = xor.model(torch.tensor([1.5, 0.25])).item()
    assert data.axis[75] == 0.25
    assert data.probability[75, -1] == pytest.approx(p, rel=1e-5)
    assert data.probability[-1, 75] != pytest.approx(p, rel=1e-5)

    loss_axes, plane_axes = figure.axes[:2]
    assert loss_axes.get_yscale() == "log"
    for axes in (loss_axes, plane_axes):
        assert axes.get_title()
        assert axes.get_xlabel()
        assert axes.get_ylabel()
    line, points = loss_axes.lines
    assert line.get_ydata().tolist() == xor.losses
    assert points.get_ydata().tolist() == xor.reference
    marked = {axes_line.get_label(): axes_line.get_xydata().tolist() for axes_line in plane_axes.lines}
    assert marked == {"class 0": [[0, 0], [1, 1]], "class 1": [[0, 1], [1, 0]]}


def test_a_surface_on_one_side_of_one_half_has_no_contour(short, tmp_path):
    pytest.importorskip("matplotlib")
    model = torch.nn.Sequential(torch.nn.Linear(2, 1), torch.nn.Sigmoid())
    torch.nn.init.zeros_(model[0].weight)
    torch.nn.init.ones_(model[0].bias)
    figure, data = plotting.plot_xor(dataclasses.replace(short, model=model))
    assert data.probability.min() > 0.5
    plotting.save(figure, tmp_path / "flat.png")  # matplotlib warns of an empty contour, here an error


@pytest.mark.parametrize(("name", "magic"), [("xor.png", b"\x89PNG\r\n"), ("xor.SVG", b"<?xml"), ("a b.pdf", b"%PDF")])
def test_save_writes_one_file_in_the_format_of_its_suffix(figure, tmp_path, name, magic):
    target = tmp_path / name
    target.write_text("old")
    plotting.check_target(target)
    assert target.read_text() == "old"
    plotting.save(figure, target)
    assert target.read_bytes().startswith(magic)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_save_follows_a_link(figure, tmp_path):
    link, target = tmp_path / "link.png", tmp_path / "elsewhere" / "real.png"
    target.parent.mkdir()
    link.symlink_to(target)
    plotting.save(figure, link)
    assert link.is_symlink()
    assert target.read_bytes().startswith(b"\x89PNG")


def test_a_save_that_fails_leaves_what_was_there(figure, tmp_path, monkeypatch):
    target = tmp_path / "xor.png"
    target.write_text("old")

    def half(path, **_):
        path.write_bytes(b"\x89PNG")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(figure, "savefig", half)
    with pytest.raises(OSError, match="No space left"):
        plotting.save(figure, target)
    assert [path.name for path in tmp_path.iterdir()] == ["xor.png"]
    assert target.read_text() == "old"


def test_without_matplotlib_the_error_says_what_to_install(short, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"install perceptriton\[cli\]"):
        plotting.plot_xor(short)
