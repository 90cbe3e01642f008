# SPDX-License-Identifier: Apache-2.0
"""Layers and networks as replacements of nn.Linear and nn.Sequential: construction, state, hooks, surgery."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from cases import assert_as_good_as_torch, assert_same, sequential, train_step, twins
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.nn.utils import parametrizations, parametrize, prune

from perceptriton.kernels import explain, small
from perceptriton.mlp import MLP, Ensemble, LinearReLU, LinearSigmoid, LinearTanh, fuse_

LAYERS = {LinearSigmoid: nn.Sigmoid, LinearTanh: nn.Tanh, LinearReLU: nn.ReLU}

# --- layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_layer_is_a_linear(layer, size):
    torch.manual_seed(1)
    linear = nn.Linear(5, 3)
    torch.manual_seed(1)
    fused = layer(5, 3)
    assert isinstance(fused, nn.Linear)
    assert list(fused.state_dict()) == ["weight", "bias"]
    assert torch.equal(fused.weight, linear.weight)
    assert torch.equal(fused.bias, linear.bias)
    assert repr(fused) == repr(linear).replace("Linear", layer.__name__)
    assert_same(fused, nn.Sequential(linear, LAYERS[layer]()))


@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_layer_takes_any_leading_shape(leading, size):
    layer = LinearSigmoid(5, 3)
    x = torch.randn(*leading, 5)
    torch.testing.assert_close(layer(x), torch.sigmoid(nn.functional.linear(x, layer.weight, layer.bias)))


def test_layer_takes_the_arguments_of_a_linear():
    layer = LinearSigmoid(5, 3, bias=False, device="meta", dtype=torch.bfloat16)
    assert layer.bias is None
    assert (layer.weight.device.type, layer.weight.dtype) == ("meta", torch.bfloat16)
    assert [type(p) for p in layer.parameters()] == [nn.Parameter]


@pytest.mark.parametrize("convert", ["double", "half", "bfloat16", "float"])
def test_layer_converts(convert, size):
    layer = getattr(LinearSigmoid(5, 3), convert)()
    x = torch.randn(7, 5).to(layer.weight.dtype)
    exact = layer.weight.detach().double(), layer.bias.detach().double()
    y = layer(x)
    assert y.dtype is layer.weight.dtype
    torch_y = torch.sigmoid(nn.functional.linear(x, layer.weight, layer.bias))
    exact_y = torch.sigmoid(nn.functional.linear(x.double(), *exact))
    assert_as_good_as_torch((y,), (torch_y,), (exact_y,), y.dtype, ("y",))


def test_layer_errors_are_those_of_the_function():
    with pytest.raises(ValueError, match=r"^x \(4, 2\) does not end in the in_features of weight \(3, 5\)$"):
        LinearSigmoid(5, 3)(torch.ones(4, 2))


def test_layer_with_a_parametrization(size):
    torch.manual_seed(1)
    fused = parametrizations.weight_norm(LinearSigmoid(5, 3))
    torch.manual_seed(1)
    linear = parametrizations.weight_norm(nn.Linear(5, 3))
    assert_same(fused, nn.Sequential(linear, nn.Sigmoid()), torch.randn(7, 5))


def _hide_weight(layer):
    squared = property(lambda self: self._parameters["weight"] ** 2)
    layer.__class__ = type("Squared", (LinearSigmoid,), {"weight": squared})


def _hide_bias(layer):
    layer.__dict__["bias"] = torch.full((3,), 0.25)


def _plain_weight(layer):
    del layer.weight
    layer.weight = torch.randn(3, 5)


def _other_activation(layer):
    layer.activation = "tanh"


@pytest.mark.parametrize("change", [_hide_weight, _hide_bias, _plain_weight, _other_activation])
def test_layer_reads_its_attributes(change, size):
    layer = LinearSigmoid(5, 3)
    change(layer)
    x = torch.randn(7, 5)
    z = nn.functional.linear(x, layer.weight, layer.bias)
    y = torch.tanh(z) if change is _other_activation else torch.sigmoid(z)
    torch.testing.assert_close(layer(x), y)
    chain = nn.Sequential(layer, nn.Linear(3, 2), nn.Sigmoid())
    expected = chain[2](chain[1](y))
    fuse_(chain)
    torch.testing.assert_close(chain(x), expected)


@pytest.mark.parametrize("rows", [3, 4096])
@pytest.mark.parametrize("make", [lambda: LinearSigmoid(4, 512), lambda: MLP([4, 8, 512])])
def test_a_vector_is_a_weight_too(make, rows):
    model = make()
    layer = model if isinstance(model, LinearSigmoid) else model[2]
    layer.weight, layer.bias = nn.Parameter(torch.randn(layer.in_features)), None
    x = torch.randn(rows, 4)
    h = x if layer is model else model[:2](x)
    torch.testing.assert_close(model(x), torch.sigmoid(nn.functional.linear(h, layer.weight)))


@pytest.mark.parametrize("leading", [(5000,), (4, 2048), (2, 3, 512)], ids=str)
def test_outputs_are_no_views(leading, monkeypatch):
    """Nor where the activation overwrites what the product has left."""
    monkeypatch.setattr(small, "few_elements", lambda *_: 0)
    monkeypatch.setattr(small, "trains_plainly", lambda *_: True)
    y = LinearSigmoid(2, 512)(torch.randn(*leading, 2))
    assert not y._is_view()
    y.detach_()


# --- networks -----------------------------------------------------------------------------------------------------

NETWORKS = {
    "xor": dict(sizes=(2, 2, 1)),
    "one-layer": dict(sizes=(3, 2)),
    "deep": dict(sizes=(4, 8, 8, 8, 2), activation="tanh"),
    "relu-identity": dict(sizes=(4, 8, 2), activation="relu", output_activation="identity"),
    "identity": dict(sizes=(4, 8, 2), activation="identity"),
    "sigmoid-tanh": dict(sizes=(4, 8, 2), output_activation="tanh"),
    "no-bias": dict(sizes=(4, 8, 2), bias=False),
}


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_network_is_a_sequential(network, size):
    torch.manual_seed(1)
    model = MLP(**network)
    torch.manual_seed(1)
    twin = sequential(**network)
    assert isinstance(model, nn.Sequential)
    assert len(model) == len(twin)
    # Same keys in the same order, same values from the same seed.
    state, other = model.state_dict(), twin.state_dict()
    assert list(state) == list(other)
    assert all(torch.equal(state[key], other[key]) for key in state)
    assert_same(model, twin)


@pytest.mark.parametrize("network", NETWORKS.values(), ids=NETWORKS)
def test_state_loads_strictly_both_ways(network, size):
    model, twin = MLP(**network), sequential(**network)
    twin.load_state_dict(model.state_dict(), strict=True)
    assert_same(model, twin)
    twin = sequential(**network)
    model.load_state_dict(twin.state_dict(), strict=True)
    assert_same(model, twin)


def test_state_survives_a_safe_file(size):
    model, other = MLP([4, 8, 2]), MLP([4, 8, 2])
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(other, model)


def test_network_dtype_and_device():
    model = MLP([4, 8, 2], device="meta", dtype=torch.float64)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}


def test_network_on_meta_knows_its_shapes():
    y = MLP([4, 8, 2], device="meta")(torch.empty(5, 4, device="meta"))
    assert (y.shape, y.device.type) == ((5, 2), "meta")


@pytest.mark.parametrize("leading", [(), (2, 3), (0,)], ids=str)
def test_network_takes_any_leading_shape(leading, size):
    model, twin = twins(4, 8, 2)
    x = torch.randn(*leading, 4)
    assert model(x).shape == (*leading, 2)
    assert_same(model, twin, x)


def test_network_is_made_of_torchs_modules():
    options = {"activation": "tanh", "output_activation": "identity"}
    model, twin = MLP([2, 3, 1], **options), sequential([2, 3, 1], **options)
    assert repr(model) == repr(twin).replace("Sequential", "MLP")
    assert [type(m) for m in model] == [type(m) for m in twin]
    assert model[0] is next(iter(model))


@pytest.mark.parametrize("integer", [np.int64, np.int32, np.uint8])
def test_sizes_are_integers_of_any_kind(integer):
    sizes = [integer(4), 8, integer(2)]
    assert repr(MLP(sizes)) == repr(MLP([4, 8, 2]))
    assert repr(Ensemble(integer(3), sizes)) == repr(Ensemble(3, [4, 8, 2]))
    assert LinearSigmoid(integer(4), 2)(torch.randn(3, 4)).shape == (3, 2)
    shapes = [(8, integer(4)), (integer(2), 8)]
    assert explain((3, integer(4)), shapes) == explain((3, 4), [(8, 4), (2, 8)])
    assert explain((3, integer(4)), shapes[0]) == explain((3, 4), (8, 4))


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        ([[1.0]], TypeError, "x must be a Tensor, not list"),
        (torch.ones(4, 2), ValueError, r"x \(4, 2\) does not end in the in_features of weight \(3, 5\)"),
        (torch.ones(4, 5).double(), ValueError, r"weight is torch\.float32, but x torch\.float64"),
    ],
    ids=["type", "shape", "dtype"],
)
def test_network_errors_are_those_of_the_function(x, error, message):
    with pytest.raises(error, match=message):
        MLP([5, 3, 2])(x)


# --- parameters are read at every call ----------------------------------------------------------------------------


def test_load_state_dict_assign(size):
    model, twin = twins(4, 8, 2)
    model(torch.randn(3, 4))
    state = {key: nn.Parameter(torch.randn_like(value)) for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    twin.load_state_dict(state)
    assert model[0].weight is state["0.weight"]
    assert_same(model, twin)


def test_functional_call(size):
    model, twin = twins(4, 8, 2)
    x = torch.randn(3, 4)
    before = model(x)
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    actual = torch.func.functional_call(model, state, (x,))
    torch.testing.assert_close(actual, torch.func.functional_call(twin, state, (x,)))
    assert torch.equal(model(x), before)


def test_stacked_ensemble_under_vmap(size):
    models = [MLP([4, 8, 2]) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(6, 4)

    def call(parameters, buffers):
        return torch.func.functional_call(models[0], (parameters, buffers), (x,))

    actual = torch.func.vmap(call)(parameters, buffers)
    torch.testing.assert_close(actual, torch.stack([model(x) for model in models]))


def test_to_empty(size):
    model = MLP([4, 8, 2], device="meta").to_empty(device="cpu")
    twin = sequential([4, 8, 2])
    model.load_state_dict(twin.state_dict())
    assert_same(model, twin)


def test_double_after_use(size):
    model, twin = twins(4, 8, 2)
    x = torch.randn(3, 4)
    model(x)
    assert_same(model.double(), twin.double(), x.double())


def delete_a_layer(net):
    del net[2]
    del net[2]


# sizes, what is done to a network that has been called and to its twin, what is seen of it
CHANGES = {
    "replaced-parameter": (
        (4, 8, 2),
        lambda net: setattr(net[0], "weight", nn.Parameter(torch.linspace(-2, 2, 32).view(8, 4))),
        lambda net: net[0].weight[0, 0] == -2,
    ),
    "written-data": ((4, 8, 2), torch.no_grad()(lambda net: [p.mul_(-1.5) for p in net.parameters()]), len),
    "tied-weights": (
        (4, 4, 4),
        lambda net: setattr(net[2], "weight", net[0].weight),
        lambda net: len(list(net.parameters())) == 3,
    ),
    "pruning": (
        (4, 8, 2),
        lambda net: prune.l1_unstructured(net[0], "weight", amount=0.5),
        lambda net: (net[0].weight == 0).sum() == 16,
    ),
    "delete": ((4, 8, 8, 2), delete_a_layer, lambda net: len(net) == 4),
    "pop": ((4, 8, 2), lambda net: (net.pop(3), net.pop(2)), lambda net: len(net) == 2),
}


@pytest.mark.parametrize(("sizes", "change", "seen"), CHANGES.values(), ids=CHANGES)
def test_changes(sizes, change, seen, size):
    model, twin = twins(*sizes)
    model(torch.randn(3, 4))
    for net in (model, twin):
        change(net)
    assert seen(model)
    assert_same(model, twin, torch.randn(7, 4))


def test_frozen_layer(size):
    model, twin = twins(4, 8, 2)
    for net in (model, twin):
        net[0].requires_grad_(False)
    x = torch.randn(3, 4)
    model(x).sum().backward()
    assert [p.grad is None for p in model.parameters()] == [True, True, False, False]
    assert_same(model, twin)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deepcopy", "pickle"]
)
def test_copies_are_independent(copied, size):
    # The identity is the activation whose function is a lambda, which pickle refuses.
    model, twin = twins(4, 8, 2, output_activation="identity")
    x = torch.randn(3, 4)
    before = model(x)  # whatever a call leaves behind must not tie the copy to the original
    other = copied(model)
    assert type(other) is MLP
    assert_same(other, twin)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert torch.equal(other(x), before)
    assert not torch.equal(model(x), before)


def test_parametrization_on_and_off(size):
    model, twin = twins(4, 8, 2)
    model(torch.randn(3, 4))
    for net in (model, twin):
        parametrizations.weight_norm(net[0])
        parametrizations.weight_norm(net[2], dim=1)
    assert_same(model, twin, torch.randn(7, 4))
    for net in (model, twin):
        parametrize.remove_parametrizations(net[0], "weight")
    assert_same(model, twin, torch.randn(7, 4))


# --- hooks --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slot", range(4))
def test_forward_hooks_fire_on_every_slot(slot, size):
    model, twin = twins(4, 8, 2)
    x = torch.randn(3, 4)
    model(x)  # a hook that comes later counts too
    seen = []
    handle = model[slot].register_forward_hook(
        lambda module, args, output: seen.append((args[0], output)) or 2 * output
    )
    y = model(x)
    ((_, output),) = seen
    expected = twin[: slot + 1](x)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(y, twin[slot + 1 :](2 * expected))
    handle.remove()
    torch.testing.assert_close(model(x), twin(x))
    assert len(seen) == 1


@pytest.mark.parametrize("slot", range(4))
def test_forward_pre_hooks_fire_on_every_slot(slot, size):
    model, _ = twins(4, 8, 2)
    x = torch.randn(3, 4)
    plain = model(x)
    handle = model[slot].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    assert not torch.allclose(model(x), plain)
    handle.remove()
    torch.testing.assert_close(model(x), plain)


@pytest.mark.parametrize("slot", range(4))
def test_backward_hooks_fire_on_every_slot(slot, size):
    model, twin = twins(4, 8, 2)
    x = torch.randn(3, 4)
    expected = train_step(twin, x)
    seen = []
    model[slot].register_full_backward_hook(lambda module, grad_input, grad_output: seen.append(grad_output[0].shape))
    torch.testing.assert_close(train_step(model, x), expected)
    assert seen == [(3, 8) if slot < 2 else (3, 2)]


@pytest.mark.parametrize("register", [register_module_forward_hook, register_module_forward_pre_hook])
def test_global_hooks_see_every_module(register, size):
    model = MLP([4, 8, 2])
    x = torch.randn(3, 4)
    plain = model(x)
    seen = []
    handle = register(lambda module, *_: seen.append(module))
    try:
        y = model(x)
    finally:
        handle.remove()
    assert set(seen) == {model, *model}
    torch.testing.assert_close(y, plain)


@pytest.mark.parametrize("slot", range(4))
def test_replaced_forward_of_an_instance(slot, size):
    # What accelerate, offloading and profiling tools do to a module.
    model, _ = twins(4, 8, 2)
    x = torch.randn(3, 4)
    plain = model(x)
    forward = model[slot].forward
    calls = []
    model[slot].forward = lambda input: calls.append(input) or forward(input)
    torch.testing.assert_close(model(x), plain)
    assert len(calls) == 1


# --- surgery ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index", [slice(2, None), slice(None, 2), slice(None, None, 2), slice(-2, None), slice(0, 0)], ids=str
)
def test_slices_are_plain(index, size):
    model, twin = twins(4, 8, 8, 2)
    part, other = model[index], twin[index]
    assert type(part) is nn.Sequential
    # The keys are those of the slots in the whole network, as those of any nn.Sequential's slice.
    assert list(part.state_dict()) == list(other.state_dict())
    assert all(a is b for a, b in zip(part, list(model)[index], strict=True))


def test_slices_compute(size):
    model, twin = twins(4, 8, 8, 2)
    assert_same(model[:2], twin[:2], torch.randn(7, 4))
    assert_same(model[2:], twin[2:], torch.randn(7, 8))
    assert model[2:][0] is model[2]


SURGERY = {
    "append-activation": lambda net: net.append(nn.Softmax(dim=-1)),
    "append-layer": lambda net: net.append(nn.Linear(2, 3)),
    "insert": lambda net: net.insert(2, nn.LayerNorm(8)),
    "extend": lambda net: net.extend([nn.Linear(2, 2), nn.Tanh()]),
    "replace": lambda net: net.__setitem__(1, nn.Dropout(0.0)),
    "concatenate": lambda net: net + nn.Sequential(nn.Softmax(dim=-1)),
}


@pytest.mark.parametrize("operate", SURGERY.values(), ids=SURGERY)
def test_surgery(operate, size):
    model, twin = twins(4, 8, 2)
    x = torch.randn(3, 4)
    changed = []
    for net in (model, twin):
        net(x)
        torch.manual_seed(1)
        changed.append(operate(net) or net)
    assert_same(*changed, x)


def test_a_layer_of_ours_takes_its_activation_along(size):
    model, twin = twins(4, 8, 2)
    model(torch.randn(3, 4))
    model[0] = LinearTanh(4, 8)
    twin[0] = nn.Sequential(nn.Linear(4, 8), nn.Tanh())
    twin[0][0].load_state_dict(model[0].state_dict())
    assert_same(model, twin)


def test_subclass_of_a_layer(size):
    class Doubled(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    model, twin = twins(4, 8, 2)
    model(torch.randn(3, 4))
    for net in (model, twin):
        torch.manual_seed(1)
        net[2] = Doubled(8, 2)
    assert_same(model, twin)


def test_children_apply_and_modes(size):
    model = MLP([4, 8, 2])
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    model.apply(lambda module: nn.init.zeros_(module.weight) if type(module) is nn.Linear else None)
    y = model.eval()(torch.randn(3, 4))
    torch.testing.assert_close(y, torch.sigmoid(model[2].bias).expand(3, 2))
    assert not any(module.training for module in model.modules())
