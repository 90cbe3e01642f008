# SPDX-License-Identifier: Apache-2.0
"""fuse_ and unfuse_: what is found, what is left alone and why, and that nobody who holds the model notices."""

import copy
import io
import pickle

import pytest
import torch
from cases import sequential
from torch import nn
from torch.nn.utils import parametrizations

from perceptriton.kernels import crossover, devices, ops
from perceptriton.mlp import MLP, LinearSigmoid, LinearTanh, fit, fuse_, unfuse_


class Head(nn.Module):
    """A classifier head as torchvision writes it: a Sequential inside, with dropout."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True))
        self.classifier = nn.Sequential(
            nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Dropout(0.0), nn.Linear(16, 16), nn.ReLU(True), nn.Linear(16, 3)
        )

    def forward(self, x):
        return self.classifier(torch.flatten(self.features(x), 1))


class ActorCritic(nn.Module):
    """A policy: a shared body, two heads."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.policy, self.value = nn.Linear(16, 2), nn.Linear(16, 1)

    def forward(self, x):
        h = self.body(x)
        return torch.cat([self.policy(h), self.value(h)], 1)


class Tower(nn.Sequential):
    """A subclass with a constructor of its own."""

    def __init__(self, inputs, outputs):
        super().__init__(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs), nn.Tanh())
        self.outputs = outputs


def shared():
    """A layer and an activation in several places."""
    layer, act = nn.Linear(4, 4), nn.Sigmoid()
    return nn.Sequential(layer, act, nn.Linear(4, 4), act, layer, nn.Tanh())


MODELS = {
    "head": (Head, (5, 1, 4, 4), ["classifier.0", "classifier.3"]),
    "actor-critic": (ActorCritic, (5, 4), ["body.0", "body.2"]),
    "subclass": (lambda: nn.Sequential(Tower(4, 3), nn.Dropout(0.0)), (5, 4), ["0.0", "0.2"]),
    "sequential": (lambda: sequential((4, 8, 2)), (5, 4), ["0", "2"]),
    "shared": (shared, (5, 4), ["0", "2", "4"]),
    "layers": (lambda: nn.Sequential(LinearTanh(4, 8), LinearSigmoid(8, 2)), (5, 4), ["0", "1"]),
    "nested": (lambda: nn.Sequential(sequential((4, 8), "tanh"), sequential((8, 2))), (5, 4), ["0.0", "1.0"]),
}


def results(model, x):
    """y and the gradient of every parameter."""
    y = model(x)
    return [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def case(request):
    make, shape, names = request.param
    torch.manual_seed(1)
    model = make()
    return model, torch.randn(shape), names


def test_models_of_real_life(case):
    model, x, names = case
    before, parameters = copy.deepcopy(model), list(model.parameters())
    modules = list(model.modules())
    kinds = {module: type(module) for module in modules if not isinstance(module, nn.Sequential)}
    expected = results(model, x)
    refused = {}
    assert sorted(fuse_(model, refused)) == sorted(names)
    # Every other Linear is named with a reason.
    others = {name for name, module in model.named_modules() if type(module) is nn.Linear} - set(names)
    assert set(refused) == others
    # The same objects of the same classes, to whoever holds them.
    assert all(type(module) is kind for module, kind in kinds.items())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    torch.testing.assert_close(results(model, x), expected)
    # Checkpoints go both ways.
    model.load_state_dict(before.state_dict(), strict=True)
    before.load_state_dict(model.state_dict(), strict=True)
    # Once more changes nothing.
    again = {}
    assert fuse_(model, again) == []
    assert again == refused
    assert sorted(unfuse_(model)) == sorted(names)
    assert repr(model) == repr(before)
    assert [type(m) for m in model.modules()] == [type(m) for m in before.modules()]
    assert [set(m.__dict__) for m in model.modules()] == [set(m.__dict__) for m in before.modules()]
    torch.testing.assert_close(results(model, x), expected)
    assert unfuse_(model) == []


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_can_be_undone_alone(case, copied):
    model, x, names = case
    fuse_(model)
    other = copied(model)
    torch.testing.assert_close(results(other, x), results(model, x))
    assert sorted(unfuse_(other)) == sorted(names)
    assert sorted(unfuse_(model)) == sorted(names)


def test_an_optimizer_goes_on(case):
    model, x, _ = case
    twin = copy.deepcopy(model)
    for net, at in ((model, 2), (twin, None)):
        optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
        for step in range(5):
            if step == at:
                fuse_(net)
            optimizer.zero_grad()
            net(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(list(model.parameters()), list(twin.parameters()))


def test_parameters_that_came_later_stay_when_it_is_undone():
    model = nn.Sequential(nn.Linear(4, 2), nn.Sigmoid())
    fuse_(model)
    state = {key: torch.randn_like(value) for key, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    model.double()
    unfuse_(model)
    assert torch.equal(model[0].weight, state["0.weight"].double())


def test_a_sequential_runs_its_layers_as_one_network(monkeypatch):
    networks = []
    forward = ops.mlp_fwd
    monkeypatch.setattr(ops, "mlp_fwd", lambda *a: networks.append(len(a[1])) or forward(*a))
    model = nn.Sequential(nn.Flatten(), *sequential((64, 600, 600)), nn.Dropout(0.0), nn.Linear(600, 3))
    x = torch.randn(2000, 8, 8)
    expected = results(model, x)
    fuse_(model)
    # 2,000 x 600 x 600 multiply-adds and 2,000 x 1,200 outputs are not small to any table
    torch.testing.assert_close(results(model, x), expected, rtol=1e-4, atol=1e-4)
    assert networks == [2]


def test_fit_takes_a_fused_sequential():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1), nn.Sigmoid())
    twin = copy.deepcopy(model)
    fuse_(model)
    x, y = torch.rand(8, 2), torch.rand(8, 1)
    for net in (model, twin):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
        assert fit(net, x, y, criterion=nn.BCELoss(), optimizer=optimizer, steps=20).path == "torch"
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_checkpoint_files(case):
    model, x, _ = case
    fuse_(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    unfuse_(other)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(other(x), model(x))


# --- what is left alone ------------------------------------------------------------------------------------------


class OwnLinear(nn.Linear):
    pass


class OwnForward(nn.Sequential):
    def forward(self, x):
        return self[0](x) + 1  # the activation is not what its place suggests


class OwnOrder(nn.Sequential):
    def __iter__(self):
        return reversed(list(self._modules.values()))


class OneLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.act = nn.Linear(4, 4), nn.Sigmoid()

    def forward(self, x):
        return self.act(self.layer(x))


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(4, 4)})])

    def forward(self, x):
        return torch.tanh(self.layers[0]["fc"](x))


class Branches(nn.ModuleDict):
    """A dictionary with a forward, as torchvision's dense blocks are."""

    def forward(self, x):
        return sum(layer(x) for layer in self.values())


class Parallel(nn.ModuleList):
    def forward(self, x):
        return sum(layer(x) for layer in self)


def with_(change):
    """What makes a layer and its activation that are changed."""

    def make():
        model = sequential((4, 4))
        change(model)
        return model

    return make


def no_hook(*_):
    pass


def belongs(kind):
    compiler = 'torch.compile(model, backend="perceptriton")'
    return f"it belongs to {kind}, which has a forward of its own: {compiler} fuses what that calls"


REFUSED = {
    "linear-hook": (with_(lambda m: m[0].register_forward_hook(no_hook)), {"0": "it has hooks"}),
    "activation-hook": (with_(lambda m: m[1].register_full_backward_hook(no_hook)), {"0": "the activation has hooks"}),
    "parametrization": (with_(lambda m: parametrizations.weight_norm(m[0])), {"0": "it is a ParametrizedLinear"}),
    "subclass": (lambda: nn.Sequential(OwnLinear(4, 4), nn.Sigmoid()), {"0": "it is a OwnLinear"}),
    "own-forward": (with_(lambda m: setattr(m[0], "forward", lambda x: 0 * x)), {"0": "it has a forward of its own"}),
    "activation-forward": (
        with_(lambda m: setattr(m[1], "forward", torch.cos)),
        {"0": "the activation has a forward of its own"},
    ),
    "compiled-layer": (with_(lambda m: m[0].compile(backend="eager")), {"0": "it has been compiled"}),
    "replaced-weight": (
        with_(lambda m: m[0].__dict__.update(weight=m[0]._parameters.pop("weight").detach())),
        {"0": "its weight is no parameter, or its class was patched"},
    ),
    "own-sequential": (lambda: OwnForward(nn.Linear(4, 4), nn.Sigmoid()), {"0": belongs("OwnForward")}),
    "own-order": (lambda: OwnOrder(nn.Linear(4, 4), nn.Sigmoid()), {"0": belongs("OwnOrder")}),
    "own-call": (
        with_(lambda m: setattr(m, "forward", lambda x: nn.Sequential.forward(m, x) + 1)),
        {"0": belongs("Sequential")},
    ),
    "attributes": (OneLayer, {"layer": belongs("OneLayer")}),
    "listed": (Listed, {"layers.0.fc": belongs("Listed")}),
    "called-dict": (
        lambda: nn.Sequential(Branches({"a": nn.Linear(4, 4), "b": nn.Sequential(nn.Linear(4, 4))})),
        {"0.a": belongs("Branches"), "0.b.0": "no activation follows it"},
    ),
    "called-list": (
        lambda: nn.Sequential(Parallel([nn.Linear(4, 4), nn.Linear(4, 4)])),
        {"0.0": belongs("Parallel"), "0.1": belongs("Parallel")},
    ),
    "alone": (lambda: nn.Linear(4, 4), {"": 'it stands alone: torch.compile(model, backend="perceptriton")'}),
    "other-activation": (lambda: nn.Sequential(nn.Linear(4, 4), nn.GELU()), {"0": "a GELU follows it"}),
    "batchnorm": (
        lambda: nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU()).eval(),
        {"0": "a BatchNorm1d follows it"},
    ),
    "nothing": (lambda: nn.Sequential(nn.Linear(4, 4), nn.Identity()), {"0": "no activation follows it"}),
    "mlp": (lambda: MLP([4, 4, 4]), {}),
    "already": (lambda: LinearTanh(4, 4), {}),
}


@pytest.mark.parametrize(("make", "reasons"), REFUSED.values(), ids=REFUSED)
def test_left_alone(make, reasons):
    torch.manual_seed(1)
    model = make()
    types, x = [type(m) for m in model.modules()], torch.randn(3, 4)
    expected, refused = model(x), {}
    assert fuse_(model, refused) == []
    assert refused == reasons
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(model(x), expected)
    assert unfuse_(model) == []


def in_list(kind):
    return f'it is in a {kind}, which has no forward: torch.compile(model, backend="perceptriton") fuses what calls it'


UNCALLED = {
    "list": (lambda: nn.ModuleList([nn.Linear(4, 4)]), {"0": in_list("ModuleList")}),
    "dict": (lambda: nn.ModuleDict({"a": nn.ModuleList([nn.Linear(4, 4)])}), {"a.0": in_list("ModuleList")}),
    "sequential": (lambda: nn.Sequential(nn.ModuleDict({"a": nn.Linear(4, 4)})), {"0.a": in_list("ModuleDict")}),
}


@pytest.mark.parametrize(("make", "reasons"), UNCALLED.values(), ids=UNCALLED)
def test_nothing_is_said_of_a_forward_that_is_not_there(make, reasons):
    assert fuse_(make(), refused := {}) == []
    assert refused == reasons


@pytest.mark.parametrize("branches", [Branches({"a": nn.Linear(4, 4)}), Parallel([nn.Linear(4, 4)])])
def test_a_pair_beside_a_container_with_a_forward_is_fused(branches):
    model = nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), branches)
    expected, (child,) = model(torch.ones(2, 4)), branches._modules
    assert fuse_(model, refused := {}) == ["0"]
    assert refused == {f"2.{child}": belongs(type(branches).__name__)}
    torch.testing.assert_close(model(torch.ones(2, 4)), expected)


def test_an_error_in_the_reasons_leaves_the_model_as_it_was(monkeypatch):
    def fails(*_):
        raise ZeroDivisionError

    model = nn.Sequential(sequential((4, 4)), nn.Linear(4, 4))
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(TypeError):
        fuse_(model, 3)
    monkeypatch.setattr("perceptriton.mlp.fusing._reason", fails)
    with pytest.raises(ZeroDivisionError):
        fuse_(model, {})
    assert [type(module) for module in model.modules()] == kinds


def test_reasons_name_the_classes_that_were_there_before():
    model = nn.Sequential(
        nn.Linear(4, 4), Tower(4, 4), nn.Linear(4, 4), sequential((4, 4)), nn.Linear(4, 4), MLP([4, 4])
    )
    model.extend([nn.Linear(4, 4), nn.ReLU()])
    expected = {"0": "a Tower follows it", "2": "a Sequential follows it", "4": "a MLP follows it"}
    for names in (["6", "1.0", "1.2", "3.0"], []):
        assert fuse_(model, refused := {}) == names
        assert refused == expected
    model.forward = lambda x: x
    assert fuse_(model, refused := {}) == []
    assert refused == dict.fromkeys(expected, belongs("Sequential"))


def test_each_place_of_a_layer_counts_by_itself():
    layer, act = nn.Linear(4, 4), nn.ReLU()
    model = nn.Sequential(layer, act, layer, nn.GELU(), nn.Identity(), layer, nn.Identity(), act, act, layer)
    refused = {}
    assert fuse_(model, refused) == ["0", "5"]
    assert refused == {"2": "a GELU follows it", "9": "no activation follows it"}
    assert unfuse_(model) == ["0", "5"]


def test_what_can_be_fused_is_fused_beside_what_cannot(monkeypatch):
    model = sequential((64, 600, 600, 600, 2), "tanh", "sigmoid")
    seen, refused = [], {}
    model[2].register_forward_hook(lambda *_: seen.append(1))
    # As many rows as this CPU wants before anything of ours runs.
    x = torch.randn(crossover.cpu_rows((600, 600, 2), "float32", devices.cpu_kind(), True), 64)
    expected = results(model, x)
    assert fuse_(model, refused) == ["0", "4", "6"]
    assert refused == {"2": "it has hooks"}
    networks = []
    forward = ops.mlp_fwd
    monkeypatch.setattr(ops, "mlp_fwd", lambda *a: networks.append(len(a[1])) or forward(*a))
    torch.testing.assert_close(results(model, x), expected, rtol=1e-4, atol=1e-4)
    assert seen == [1, 1]
    assert networks == [2]  # the two layers behind the one that is looked at


def test_an_unfused_class_is_undone_first():
    model = sequential((4, 4))
    fuse_(model)
    model.__class__ = type("Wrapped", (type(model),), {})
    with pytest.raises(ValueError, match=r"^model has become a Wrapped: undo that first$"):
        unfuse_(model)


@pytest.mark.parametrize("function", [fuse_, unfuse_])
def test_errors(function):
    with pytest.raises(TypeError, match=r"^model must be an nn\.Module, not list$"):
        function([nn.Linear(2, 2)])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler itself uses what torch deprecates
def test_compiles_after_fusing(case):
    model, x, _ = case
    expected = results(model, x)
    fuse_(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    actual = [y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))]
    torch.testing.assert_close(actual, expected)
