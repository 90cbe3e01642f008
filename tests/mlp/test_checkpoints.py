# SPDX-License-Identifier: Apache-2.0
"""Checkpoints are data: they load with weights_only, hold no more than the model, and training goes on from them."""

import io

import pytest
import torch
from torch import nn
from training_cases import OPTIMIZERS, STATEFUL

from perceptriton.mlp import MLP, Ensemble, LinearSigmoid, LinearSigmoidBCELoss, LinearTanh, fit, fuse_


def head():
    return LinearSigmoidBCELoss(4, 3, pos_weight=torch.full((3,), 2.0))


def fused():
    model = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Dropout(0.5), nn.Linear(8, 2), nn.Tanh()).eval()
    assert fuse_(model) == ["0", "3"]
    return model


def ensemble():
    return Ensemble(3, [4, 8, 2])


MODELS = {
    "layer": lambda: LinearTanh(4, 3),
    "no-bias": lambda: LinearSigmoid(4, 3, bias=False),
    "head": head,
    "network": lambda: MLP([4, 8, 2]),
    "fused": fused,
    "ensemble": ensemble,
    "member": lambda: ensemble().member(1),
    "subset": lambda: ensemble().subset([2, 0]),
}


def saved_and_loaded(value):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_dense(state):
    """No tensor drags a larger one along, as a view into a flat buffer would."""
    for name, tensor in state.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def assert_same_outputs(model, twin):
    x, target = torch.randn(5, 4), torch.rand(5, 3)
    arguments = (x, target) if isinstance(model, LinearSigmoidBCELoss) else (x,)
    assert torch.equal(model(*arguments), twin(*arguments))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_state_loads_as_data(make):
    model, twin = make(), make()
    state = saved_and_loaded(model.state_dict())
    assert {name: t.shape for name, t in state.items()} == {name: p.shape for name, p in model.named_parameters()}
    assert_dense(state)
    twin.load_state_dict(state, strict=True)
    assert_same_outputs(model, twin)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_state_makes_a_safetensors_file(make, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    model, twin = make(), make()
    # It refuses tensors that share memory, and objects that are no tensors.
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    twin.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"), strict=True)
    assert_same_outputs(model, twin)


@pytest.mark.parametrize("optimizer", ["sgd", *STATEFUL])
@pytest.mark.parametrize("make", [MODELS["network"], fused, ensemble], ids=["network", "fused", "ensemble"])
def test_training_goes_on_from_a_checkpoint(make, optimizer):
    x, y = torch.randn(64, 4), torch.rand(64, 2)
    model, twin = make(), make()
    own, other = (OPTIMIZERS[optimizer](m.parameters()) for m in (model, twin))

    def train(model, optimizer):
        return fit(model, x, y, criterion=nn.MSELoss(), optimizer=optimizer, steps=20, log_every=1).loss

    first = train(model, own)
    checkpoint = saved_and_loaded({"model": model.state_dict(), "optimizer": own.state_dict()})
    assert_dense(checkpoint["model"])
    for state in checkpoint["optimizer"]["state"].values():
        assert_dense({name: value for name, value in state.items() if isinstance(value, torch.Tensor)})
    twin.load_state_dict(checkpoint["model"], strict=True)
    other.load_state_dict(checkpoint["optimizer"])
    expected = train(model, own)
    assert not torch.equal(first, expected)
    assert torch.equal(train(twin, other), expected)
    for actual, parameter in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.equal(actual, parameter)
