# SPDX-License-Identifier: Apache-2.0
"""What fit returns: a table, a file, a picture."""

import copy
import csv
import io
import math
import pickle
import re
import sys

import pytest
import torch

from perceptriton.mlp import EarlyStopping, Ensemble, History, fit

pytestmark = pytest.mark.usefixtures("one_thread")

SINGLE = History(
    [0, 2, 4], torch.tensor([0.5, 0.25, 0.125]), 1.0, "torch",
    evaluated=[2, 5], validation={"loss": torch.tensor([1.0, 2.0]), "accuracy": torch.tensor([0.5, 0.75])},
)  # fmt: skip
MANY = History(
    [0, 3], torch.tensor([[1.0, 2.0, 3.0], [4.0, torch.nan, 6.0]]), 1.0, "native",
    evaluated=[3], validation={"loss": torch.tensor([[7.0, 8.0, 9.0]])},
)  # fmt: skip


def same(a, b):
    return a == b or (math.isnan(a) and math.isnan(b))


def assert_table(found, expected):
    assert list(found) == list(expected)
    for name, column in expected.items():
        assert len(found[name]) == len(column)
        assert all(map(same, found[name], column)), name


nan = math.nan
TABLES = {
    "single": (SINGLE, False, {
        "step": [0, 2, 4, 5], "loss": [0.5, 0.25, 0.125, nan],
        "validation_loss": [nan, 1, nan, 2], "validation_accuracy": [nan, 0.5, nan, 0.75],
    }),
    "long": (MANY, False, {
        "step": [0, 0, 0, 3, 3, 3], "member": [0, 1, 2, 0, 1, 2], "loss": [1, 2, 3, 4, nan, 6],
        "validation_loss": [nan, nan, nan, 7, 8, 9],
    }),
    "wide": (MANY, True, {
        "step": [0, 3], "loss_0": [1, 4], "loss_1": [2, nan], "loss_2": [3, 6],
        "validation_loss_0": [nan, 7], "validation_loss_1": [nan, 8], "validation_loss_2": [nan, 9],
    }),
    "nothing": (History([], torch.empty(0), 0.0, "torch"), False, {"step": []}),
    "nothing-of-many": (History([], torch.empty(0, 2), 0.0, "torch"), False, {"step": [], "member": []}),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLES)
def test_tables(case, tmp_path):
    history, wide, expected = TABLES[case]
    assert_table(history.to_dict(wide), expected)
    path = tmp_path / "curve.csv"
    path.write_text("what was there before")
    history.to_csv(path, wide)
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert_table({name: [float(row[i]) for row in rows] for i, name in enumerate(header)}, expected)
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_stays_one(tmp_path):
    (tmp_path / "runs").mkdir()
    link = tmp_path / "newest.csv"
    link.symlink_to("runs/7.csv")
    SINGLE.to_csv(link)
    assert link.is_symlink()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["7.csv"]


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "curve.csv"
    path.write_text("what was there before")

    class Failing:
        def __init__(self, file):
            self.file = file

        def writerows(self, rows):
            self.file.write("step,lo")
            raise OSError("the disk is full")

    monkeypatch.setattr(csv, "writer", Failing)
    with pytest.raises(OSError, match="the disk is full"):
        SINGLE.to_csv(path)
    assert [(p, p.read_text()) for p in tmp_path.iterdir()] == [(path, "what was there before")]


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    for name, error in (
        ("nowhere/h.csv", FileNotFoundError),
        ("folder", IsADirectoryError),
        ("file/h.csv", NotADirectoryError),
    ):
        path = tmp_path / name
        with pytest.raises(error, match=rf": {re.escape(repr(str(path)))}$"):
            SINGLE.to_csv(path)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "file"}


@pytest.mark.parametrize("history", [SINGLE, MANY], ids=["single", "ensemble"])
def test_pandas_has_the_columns_by_name(history):
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    frame = pandas.DataFrame(history)
    assert_table({name: frame[name].tolist() for name in frame.columns}, history.to_dict())


@pytest.mark.parametrize("how", ["torch", "pickle", "deepcopy"])
def test_copies_and_files(how):
    ensemble = Ensemble(3, [2, 3, 1], generator=torch.Generator().manual_seed(0))
    x, y = torch.rand(4, 2), torch.rand(4, 1)
    options = {"criterion": torch.nn.BCELoss(), "optimizer": torch.optim.SGD(ensemble.parameters(), lr=0.1)}
    options |= {
        "steps": 6,
        "batch_size": 3,
        "log_every": 2,
        "validation": (x, y),
        "stop": EarlyStopping(keep_best=True),
    }
    history = fit(ensemble, x, y, **options)
    if how == "torch":
        buffer = io.BytesIO()
        torch.save({"history": history}, buffer)
        buffer.seek(0)
        found = torch.load(buffer, weights_only=True)["history"]
    else:
        found = copy.deepcopy(history) if how == "deepcopy" else pickle.loads(pickle.dumps(history))
    assert type(found) is History
    assert_table(found.to_dict(), history.to_dict())
    assert found.reason == history.reason != ""
    assert torch.equal(found.state["order"][0], history.state["order"][0])


@pytest.mark.parametrize("history", [SINGLE, MANY], ids=["single", "ensemble"])
def test_curves(history):
    axes = pytest.importorskip("matplotlib.figure").Figure().subplots()
    assert history.plot(axes, (0.0, 1.0)) is axes
    series = [history.loss, history.validation["loss"]]
    lines = [line.get_ydata() for line in axes.lines]
    expected = [values if values.dim() == 1 else values.double().nanquantile(0.5, 1) for values in series]
    assert [list(map(float, line)) for line in lines] == [values.tolist() for values in expected]
    assert [list(line.get_xdata()) for line in axes.lines] == [history.steps, history.evaluated]
    if history is MANY:
        edges = axes.collections[0].get_paths()[0].vertices
        assert {(0.0, 1.0), (0.0, 3.0), (3.0, 4.0), (3.0, 6.0)} <= set(map(tuple, edges.tolist()))
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_yscale()) == ("step", "loss", "log")
    assert len(axes.get_legend().get_texts()) == len(axes.lines) + len(axes.collections)
    with pytest.raises(ValueError, match=r"^quantiles must be two in order within \[0, 1\], not \(0.9, 0.1\)$"):
        history.plot(quantiles=(0.9, 0.1))
    assert len(History([], torch.empty(0), 0.0, "torch").plot().lines) == 0


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"^plots need matplotlib: install perceptriton\[cli\]$"):
        SINGLE.plot()
