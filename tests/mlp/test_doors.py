# SPDX-License-Identifier: Apache-2.0
"""First mistakes: each is refused at the door, by an error that names the argument and what it was given."""

import re

import numpy as np
import pytest
import torch
from torch import nn

from perceptriton import explain
from perceptriton.kernels import Device
from perceptriton.mlp import MLP, EarlyStopping, Ensemble, LinearSigmoidBCELoss, fit, fit_sharded, report, warmup

NETS, X, Y = Ensemble(2, [4, 3, 1]), torch.rand(6, 4), torch.rand(6, 1)
SGD = torch.optim.SGD(NETS.parameters(), lr=0.1)
SHARDED = {"criterion": nn.BCELoss(), "steps": 1}

MISTAKES = {
    "array": (lambda: NETS(X.numpy()), TypeError, "input must be a Tensor, not ndarray"),
    "list": (lambda: NETS([[0.0]]), TypeError, "input must be a Tensor, not list"),
    "dtype": (lambda: NETS(X.double()), ValueError, "input is torch.float64, but the parameters torch.float32"),
    "integers": (lambda: NETS(X.long()), ValueError, "input is torch.int64, but the parameters torch.float32"),
    "best": (lambda: NETS.best([1.0, 2.0]), TypeError, "losses must be a Tensor or a History, not list"),
    "activation": (lambda: MLP([4, 4], ["tanh"]), ValueError, "activation must be one of .*, not \\['tanh'\\]"),
    "class": (
        lambda: fit(MLP([4, 1]), X, Y, criterion=nn.BCELoss, optimizer=SGD, steps=1),
        TypeError,
        "criterion must be a BCELoss\\(\\), not the class BCELoss itself",
    ),
    "metrics": (
        lambda: fit(
            MLP([4, 1]), X, Y, criterion=nn.BCELoss(), optimizer=SGD, steps=1, validation=(X, Y), metrics="loss"
        ),
        TypeError,
        "metrics must be a sequence of metrics, as in \\['loss'\\], not 'loss'",
    ),
    "optimizer": (
        lambda: fit_sharded(NETS, X, Y, optimizer=SGD, **SHARDED),
        TypeError,
        "optimizer must be a function that makes one for a share, not SGD",
    ),
    "scheduler": (
        lambda: fit_sharded(NETS, X, Y, optimizer=lambda p: SGD, scheduler="cosine", **SHARDED),
        TypeError,
        "scheduler must be a function that makes one for a share, not str",
    ),
    "warmup": (lambda: warmup(MLP([4, 1]), np.ones((2, 4))), TypeError, "inputs\\[0\\] must be a Tensor, not ndarray"),
    "report": (
        lambda: report(MLP([4, 1]), np.ones(4)),
        TypeError,
        "example must be a Tensor or a tuple .*, not ndarray",
    ),
    "weight": (
        lambda: LinearSigmoidBCELoss(4, 1, pos_weight=2.0),
        TypeError,
        "pos_weight must be a Tensor or None, not float",
    ),
    "capability": (lambda: Device("cuda", arch=9.0, triton=True), TypeError, "arch must be an int, .*, not 9.0"),
    "major": (lambda: Device("cuda", arch=9, triton=True), ValueError, "arch must be .*, at least 10, not 9"),
    "major-alone": (lambda: Device("cuda", arch=9), ValueError, "arch must be .*, at least 10, not 9"),
    "no-arch": (lambda: Device("cuda", triton=True), ValueError, "arch must be .*, at least 10, not 0"),
}


@pytest.mark.parametrize(("call", "error", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_named(call, error, message):
    with pytest.raises(error, match=f"^{message}$"):
        call()


def test_autocast_casts_what_an_ensemble_gets():
    with torch.autocast("cpu", torch.bfloat16):
        assert NETS(X).dtype == torch.bfloat16


def test_explain_is_at_the_top():
    assert "forward" in str(explain((4, 2), (2, 2)))


def test_the_reason_names_the_module_that_stands_in_the_way():
    model = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 1), nn.Sigmoid())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    history = fit(model, X, Y, criterion=nn.BCELoss(), optimizer=optimizer, steps=1)
    assert re.match("GELU is not part of a chain", history.reason)


def test_the_reason_stays_where_members_stop():
    nets = Ensemble(3, [4, 3, 1])
    nets.weights[0].data[0] = torch.nan  # which never improves
    options = {"criterion": nn.BCELoss(), "optimizer": torch.optim.SGD(nets.parameters(), lr=0.1), "steps": 20}
    stop = EarlyStopping(2, threshold=0.0)
    history = fit(nets, X, Y, validation=(X, Y), evaluate_every=2, stop=stop, impl="torch", **options)
    assert history.stopped[0] == 4
    assert history.reason == 'impl="torch"'
