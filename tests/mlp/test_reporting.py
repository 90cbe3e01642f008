# SPDX-License-Identifier: Apache-2.0
"""report: every Linear with what became of it, the paths, the times, and a model that is what it was."""

import copy
import io
import sys
import threading

import pytest
import torch
from torch import nn

from perceptriton.kernels import explain
from perceptriton.mlp import MLP, fuse_, report

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setattr("perceptriton.mlp.reporting.SECONDS", 0.01)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.BatchNorm1d(40))
        self.gate, self.drop = nn.Linear(40, 40), nn.Dropout(0.5)

    def forward(self, x, scale=None):
        h = self.body(x)
        return self.drop(h * torch.sigmoid(self.gate(h))), {"scale": scale}


def lines(capsys, *arguments):
    report(*arguments)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("fused", [False, True])
def test_a_model_is_described_and_left_as_it_was(fused, capsys):
    model, x = Gated(), torch.randn(500, 6)
    if fused:
        fuse_(model)
    before, generator = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    kinds = [type(m) for m in model.modules()]
    found = lines(capsys, model, (x, 2))
    plans = str(explain((500, 6), [(40, 6), (40, 40)])).splitlines()
    compiler = 'torch.compile(model, backend="perceptriton")'
    assert found[:-2] == [
        f"gate    left alone: it belongs to Gated, which has a forward of its own: {compiler} fuses what that calls",
        "body.0  fused",
        "        a network of 2 layers on x (500, 6)",
        *(f"        {plan}" for plan in plans),
        "body.2  fused",
    ]
    assert found[-1].startswith("forward and backward: ")
    assert found[-1].endswith("x")
    assert kinds == [type(m) for m in model.modules()]
    assert torch.equal(torch.get_rng_state(), generator)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


def test_a_path_stands_at_the_place_that_takes_it(capsys):
    layer, plans = nn.Linear(4, 4), str(explain((3, 4), (4, 4))).splitlines()
    model = nn.Sequential(layer, nn.GELU(), layer, nn.Tanh(), nn.Linear(4, 4), nn.Tanh())
    model[4].register_forward_hook(lambda *_: None)
    assert lines(capsys, nn.Sequential(model), torch.randn(3, 4))[:-2] == [
        "0.0  left alone: a GELU follows it",
        "0.2  fused",
        "     a layer on x (3, 4)",
        *(f"     {plan}" for plan in plans),
        "0.4  left alone: it has hooks",
    ]


@pytest.mark.parametrize("wants", ["nothing", "gradient", "computed"])
def test_a_model_that_writes_over_its_arguments_gets_copies(wants, capsys):
    class Writes(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4), nn.Tanh())

        def forward(self, x, again, state):
            found.append((x.sum().item(), state["h"].sum().item(), len(state), x is again))
            state["h"].add_(x)
            state["more"] = 0
            return self.body(x)

    found: list[tuple] = []
    x, h = -torch.ones(3, 4), torch.ones(3, 4)
    if wants != "nothing":
        x.requires_grad_()
    given = (x * 1 if wants == "computed" else x, {"h": h})
    lines(capsys, Writes(), (given[0], *given))
    assert len(found) > 10
    assert set(found) == {(-12.0, 12.0, 1, True)}
    assert torch.equal(given[0], -torch.ones(3, 4))
    assert torch.equal(h, torch.ones(3, 4))
    assert list(given[1]) == ["h"]
    assert x.grad is None


@pytest.mark.parametrize(
    ("terminal", "patience", "shown"), [(True, 0.0, True), (True, 9.0, False), (False, 0.0, False)]
)
def test_progress_is_a_line_at_a_terminal_that_needs_no_tqdm(terminal, patience, shown, monkeypatch, capsys):
    class Stderr(io.StringIO):
        def isatty(self):
            return terminal

    monkeypatch.setattr(sys, "stderr", stderr := Stderr())
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr("perceptriton.mlp.reporting.PATIENCE_SECONDS", patience)
    # As of a slow model: the time that fast ones are measured is over at once, and what is left is a number of rounds.
    monkeypatch.setattr("perceptriton.mlp.reporting.SECONDS", 1e-9)
    found = lines(capsys, MLP([4, 3]), torch.randn(3, 4))
    assert not any("report:" in line for line in found)
    *steps, _, end = stderr.getvalue().split("\r") if shown else ["", "", ""]
    assert steps[1:] == [f"report: {done}%" for done in range(0, 100, 10) if shown]
    assert end == ""


def test_progress_leaves_no_line_where_a_call_fails(monkeypatch, capsys):
    class Fails(nn.Module):
        def forward(self, x):
            calls.append(x)
            if len(calls) == 5:
                raise ZeroDivisionError
            return x

    calls: list[torch.Tensor] = []
    monkeypatch.setattr(sys, "stderr", stderr := io.StringIO())
    monkeypatch.setattr(stderr, "isatty", lambda: True)
    monkeypatch.setattr("perceptriton.mlp.reporting.PATIENCE_SECONDS", 0.0)
    with pytest.raises(ZeroDivisionError):
        report(Fails(), torch.randn(3))
    assert stderr.getvalue().endswith(" \r")


def test_without_gradients(capsys):
    model = MLP([4, 3]).requires_grad_(False)
    found = lines(capsys, model, torch.randn(3, 4))
    assert found[:2] == ["0  fused", "   a layer on x (3, 4)"]
    assert found[-1].startswith("forward: ")


UNCOPIED = {
    "tensor": (
        lambda y: y,
        r"model\.0\.kept holds a tensor with the graph that computed it, which torch does not copy",
    ),
    "list": (lambda y: [y], r"model\.0\.kept holds a tensor with the graph"),
    "dict": (lambda y: {"features": (0, y)}, r"model\.0\.kept holds a tensor with the graph"),
    "lock": (lambda _: threading.Lock(), r"TypeError: cannot pickle '_thread\.lock' object"),
}


@pytest.mark.parametrize(("kept", "why"), UNCOPIED.values(), ids=UNCOPIED)
def test_a_model_that_cannot_be_copied_is_named_with_the_reason(kept, why, capsys):
    model = nn.Sequential(Gated(), nn.Linear(40, 40), nn.Tanh())
    model[0].kept = kept(model[1](torch.randn(3, 40)))
    with pytest.raises(ValueError, match=f"^model cannot be copied, and only copies are called and timed: {why}"):
        report(model, torch.randn(3, 6))
    assert type(model) is nn.Sequential
    assert capsys.readouterr().out == ""


def test_what_a_model_raises_is_raised(capsys):
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        report(MLP([4, 3]), torch.randn(3, 5))
    with pytest.raises(TypeError, match=r"^model must be an nn\.Module, not list$"):
        report([nn.Linear(2, 2)], torch.randn(3, 2))
    assert capsys.readouterr().out == ""
