# SPDX-License-Identifier: Apache-2.0
"""Models that are changed after they were fused: what they compute is what the same changes make of plain torch."""

import copy
import functools
import io
import itertools
import pickle
import random
from collections import OrderedDict
from typing import ClassVar

import cases
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads
from torch.optim.swa_utils import AveragedModel

from perceptriton.mlp import MLP, LinearReLU, LinearSigmoid, LinearTanh, chains, fit, fuse_, sequential, unfuse_
from perceptriton.mlp.chains import own_method
from perceptriton.mlp.sequential import steps_of

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings(r"ignore:.*torch\.jit\.")]


def twins(*modules):
    """Two Sequentials of the same modules, the first one fused and called."""
    twin = nn.Sequential(*modules)
    model = copy.deepcopy(twin)
    assert fuse_(model)
    model(torch.randn(3, 4))
    return model, twin


def pairs(*more):
    return twins(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 4), nn.Tanh(), *more)


def results(net, x):
    """y and the gradients of the parameters."""
    y = net(x)
    parameters = [p for p in net.parameters() if p.requires_grad]
    if not y.requires_grad:
        return [y]
    return [y, *torch.autograd.grad(y.square().sum(), parameters, allow_unused=True, materialize_grads=True)]


def same(model, twin, x=None):
    x = torch.randn(7, 4) if x is None else x
    torch.testing.assert_close(results(model, x), results(twin, x))
    kinds = [[type(m).__name__ for m in net.modules()][1:] for net in (model, twin)]
    assert kinds[0] == kinds[1]


# --- forwards that follow something else than their inputs ------------------------------------------------------


class Modes(nn.Module):
    """Whether the activation runs depends on what a trace at another time cannot show."""

    def __init__(self):
        super().__init__()
        self.fc, self.act, self.plain, self.calls = nn.Linear(4, 4), nn.Sigmoid(), False, 0

    def forward(self, x, mask=None):
        self.calls += 1
        z = self.fc(x)
        if self.training or self.plain or not torch.is_grad_enabled() or mask is not None:
            return z
        return self.act(z)

    def logits(self, x):
        return self.fc(x)


class Parent(nn.Module):
    """Reaches past the forward of its child, and past that of a Sequential."""

    def __init__(self):
        super().__init__()
        self.child, self.body = Modes(), nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        return self.child.fc(x) + self.child(x, mask=x) + self.body(x) + self.body[0](x) + self.body[1:3](x)


def test_forwards_that_follow_python_state():
    twin = Parent()
    model = copy.deepcopy(twin).eval()
    assert fuse_(model) == ["body.0", "body.2"]
    assert model.child.calls == 0  # nothing is run to find out
    x = torch.randn(3, 4)
    for change in (nn.Module.train, nn.Module.eval, lambda m: setattr(m.child, "plain", True)):
        for net in (model, twin):
            change(net)
        with torch.set_grad_enabled(change is not nn.Module.train):
            torch.testing.assert_close(model(x), twin(x))
            torch.testing.assert_close(model.child(x), twin.child(x))
            torch.testing.assert_close(model.child.logits(x), twin.child.logits(x))


def test_nothing_is_left_behind_by_fusing():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.fc, self.seen = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Linear(4, 4), []
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += torch.rand(())
            self.features = torch.sigmoid(self.fc(self.net(x)))
            return self.features

    model, state = Keeps(), torch.get_rng_state()
    assert fuse_(model) == ["net.0"]
    assert not hasattr(model, "features")
    assert torch.equal(torch.get_rng_state(), state)
    assert model.count == 0


# --- modules that come, go and change -----------------------------------------------------------------------------


class LoRA(nn.Module):
    """A layer and a product of low rank beside it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.low, self.high = base, nn.Linear(base.in_features, 2, False), nn.Linear(2, base.out_features)

    def forward(self, x):
        return self.base(x) + self.high(self.low(x))


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def drop(net, *indices):
    for index in sorted(indices, reverse=True):
        del net[index]


def set_item(index, make):
    return lambda net: net.__setitem__(index, make())


SURGERY = {
    "replaced-layer": set_item(2, lambda: nn.Linear(8, 4)),
    "replaced-activation": set_item(1, nn.ReLU),
    "other-module": set_item(1, nn.GELU),
    "last-is-identity": set_item(-1, nn.Identity),
    "batchnorm-between": lambda net: net.insert(1, nn.BatchNorm1d(8)),
    "layer-inserted": lambda net: net.insert(2, nn.Linear(8, 8)),
    "popped": lambda net: net.pop(3),
    "deleted-pair": lambda net: drop(net, 2, 3) or net.append(nn.Linear(8, 4)),
    "appended": lambda net: net.append(LinearReLU(4, 3)),
    "lora": lambda net: net.__setitem__(0, LoRA(net[0])),
    "subclass": set_item(0, lambda: Scaled(4, 8)),
    "weight-norm": lambda net: parametrizations.weight_norm(net[2]),
    "old-weight-norm": lambda net: nn.utils.weight_norm(net[0]),
    "own-forward": lambda net: setattr(net[1], "forward", torch.cos),
    "plain-weight": lambda net: net[0].__dict__.update(weight=net[0]._parameters.pop("weight").detach()),
    "hidden-weight": lambda net: net[0].__dict__.update(weight=torch.ones(8, 4)),
    "bias-as-buffer": lambda net: (
        (b := net[0]._parameters.pop("bias")) is None or net[0].register_buffer("bias", b + 1)
    ),
    "new-parameters": lambda net: setattr(
        net[0], "_parameters", {"weight": nn.Parameter(torch.ones(8, 4)), "bias": None}
    ),
    "set-state": lambda net: net[2].__setstate__(nn.Linear(8, 4).__dict__),
    "new-modules": lambda net: setattr(net, "_modules", OrderedDict(a=nn.Linear(4, 2), b=nn.Tanh())),
    "other-class": lambda net: setattr(net[1], "__class__", nn.Tanh),
    "other-class-of-a-layer": lambda net: setattr(net[2], "__class__", Scaled),
    "hook-before-a-buffer": lambda net: (SURGERY["bias-as-buffer"](net[2:]), SURGERY["doubled"](net)),
    "doubled": lambda net: net[0].register_forward_hook(lambda m, args, y: 2 * y),
    "compiled-layer": lambda net: net[0].compile(backend="eager"),
    "moved-out": lambda net: drop(net, 0, 1) or net.insert(0, nn.Linear(4, 8)),
    "no-bias": lambda net: setattr(net[0], "bias", None),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@pytest.mark.parametrize("name", SURGERY)
def test_surgery(name, size):
    model, twin = pairs()
    for net in (model, twin):
        torch.manual_seed(1)
        SURGERY[name](net)
    same(model, twin)


def test_a_layer_moves_to_another_model(size):
    model, twin = pairs()
    others = [nn.Sequential(net[0], nn.ReLU(), net[3]) for net in (model, twin)]
    same(*others)
    fuse_(others[0])
    same(*others)
    assert unfuse_(model[0]) == []  # a layer alone has nothing to undo
    same(copy.deepcopy(model), twin)


def test_slices_and_sums():
    model, twin = pairs()
    for part in (slice(None, -1), slice(1, 3), slice(2, None)):
        x = torch.randn(7, 8 if part.start else 4)
        same(model[part], twin[part], x)
    same(model + nn.Sequential(nn.Softmax(-1)), twin + nn.Sequential(nn.Softmax(-1)))
    assert type(MLP([4, 8, 2])[:2]) is nn.Sequential


def hooks(net, seen):
    """Replaces every dict of hooks by a fresh one, and then registers."""
    for index, module in enumerate(net):
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            setattr(module, name, OrderedDict())
        module.register_forward_hook(lambda m, args, y, index=index: seen.append((index, args[0], y)))
    return seen


def test_hooks_in_new_dicts_see_what_torch_shows_them(size):
    model, twin = pairs()
    seen = hooks(model, []), hooks(twin, [])
    x = torch.randn(3, 4)
    model(x), twin(x)
    torch.testing.assert_close(*seen)
    assert [index for index, *_ in seen[0]] == [0, 1, 2, 3]


@pytest.mark.parametrize("index", [2, 3])
@pytest.mark.parametrize("kind", ["backward", "backward-pre", "pre", "forward"])
def test_every_kind_of_hook_in_a_new_dict(kind, index, size):
    model, _ = pairs()
    seen, module = [], model[index]
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        setattr(module, name, OrderedDict())
    register = {
        "backward": module.register_full_backward_hook,
        "backward-pre": module.register_full_backward_pre_hook,
        "pre": module.register_forward_pre_hook,
        "forward": module.register_forward_hook,
    }[kind]
    register(lambda *_: seen.append(1))
    model(torch.randn(3, 4)).sum().backward()
    assert seen == [1]


def test_fit_sees_new_dicts():
    model, _ = pairs()
    seen = []
    model[0]._forward_hooks = OrderedDict()
    model[0].register_forward_hook(lambda *_: seen.append(1))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.rand(5, 4), torch.rand(5, 4)
    assert fit(model, x, y, criterion=nn.MSELoss(), optimizer=sgd, steps=3).path == "general"
    assert seen == [1, 1, 1]


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        (kind, name)
        for kind in (nn.Module, nn.Linear, nn.Sigmoid, nn.Sequential, MLP, nn.MSELoss)
        for name in ("__call__", "_call_impl", "forward")
        if (kind, name) != (nn.Module, "forward")
    ],
)
def test_fit_sees_patched_classes(kind, name, monkeypatch):
    model, criterion, seen, was = MLP([4, 8, 2], output_activation="identity"), nn.MSELoss(), [], getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda module, *args: twice(seen, was)(module, *args))
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    assert fit(model, torch.rand(5, 4), torch.rand(5, 2), criterion=criterion, optimizer=sgd, steps=3).path == "general"
    assert len(seen) >= 3


@pytest.mark.parametrize("raises", [RuntimeError, ValueError, TypeError, KeyError])
def test_what_a_hook_raises_is_raised_once(raises, size):
    model, _ = pairs()
    seen = []

    def stop(*_):
        seen.append(1)
        handle.remove()
        raise raises("enough")

    handle = model[1].register_forward_hook(stop)
    with pytest.raises(raises, match="enough"):
        model(torch.randn(3, 4))
    assert seen == [1]


@pytest.mark.parametrize("kind", [nn.Linear, nn.Sigmoid, nn.Tanh])
def test_patched_classes(kind, size, monkeypatch):
    model, twin = pairs()
    x = torch.randn(3, 4)
    before, forward = twin(x), kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x) + 1)
    same(model, twin, x)
    assert not torch.allclose(twin(x), before)
    monkeypatch.undo()
    same(model, twin, x)


def test_classes_that_were_patched_before(monkeypatch):
    assert own_method(nn.Linear) is nn.Linear.forward
    assert own_method(LinearSigmoid) is LinearSigmoid.forward
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", functools.wraps(forward)(lambda self, x: forward(self, x) + 1))
    assert own_method(nn.Linear) is None
    for name in ("__call__", "_call_impl"):
        call = getattr(nn.Module, name)
        assert own_method(nn.Module, name) is call
        monkeypatch.setattr(
            nn.Module, name, functools.wraps(call)(lambda module, *args, call=call: call(module, *args))
        )
        assert own_method(nn.Module, name) is None


@pytest.mark.parametrize("name", ["CALL", "CALL_IMPL"])
def test_calls_that_were_patched_before(name, size, monkeypatch):
    model, twin = pairs()
    for file in (chains, sequential):
        monkeypatch.setattr(file, name, None)
    seen, was = [], nn.Module.__call__
    monkeypatch.setattr(nn.Module, "__call__", lambda module, *args: twice(seen, was)(module, *args))
    same(model, twin)
    assert len(seen) == 2 * 5


def test_patched_calls_and_sequentials(size, monkeypatch):
    """As tools do that draw a model: all calls of modules are seen."""
    model, twin = pairs()
    x, call, seen = torch.randn(3, 4), nn.Module.__call__, []

    def watched(module, *args, **kwargs):
        seen.append(type(module))
        return call(module, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "__call__", watched)
        same(model, twin, x)
    assert seen.count(nn.Linear) == 4
    model, twin = Tower(), Tower()
    fused(model).load_state_dict(twin.state_dict())
    for kind in (nn.Sequential, Tower):
        same(model, twin, x)
        monkeypatch.setattr(kind, "forward", lambda self, x: self[0](x))
        same(model, twin, x)
        monkeypatch.undo()
    same(model, twin, x)


def twice(seen, call):
    """The call with its result doubled; it is counted."""

    def counts(*args, **kwargs):
        seen.append(1)
        return 2 * call(*args, **kwargs)

    return counts


def seeing(seen, factor=None):
    def sees(module, *given):
        seen.append(type(module).__name__.removeprefix("Fused"))
        return None if factor is None else factor * given[-1]

    return sees


def of_all(kind):
    return getattr(nn.modules.module, f"register_module_{kind}")


# What the call of a module runs besides the forward of its class. Each takes the Sequential and the list of what was
# seen, and returns what undoes it, if it has to be undone.
CALLS = {
    "forward": lambda net, seen: net.register_forward_hook(seeing(seen, 2)),
    "forward-always": lambda net, seen: net.register_forward_hook(seeing(seen), always_call=True),
    "pre": lambda net, seen: net.register_forward_pre_hook(lambda m, args: seen.append(1) or (2 * args[0],)),
    "pre-kwargs": lambda net, seen: net.register_forward_pre_hook(
        lambda m, args, options: seen.append(dict(options)) or (args or (options["input"],), {}), with_kwargs=True
    ),
    "backward": lambda net, seen: net.register_full_backward_hook(seeing(seen)),
    "backward-pre": lambda net, seen: net.register_full_backward_pre_hook(seeing(seen)),
    "all-forward": lambda net, seen: of_all("forward_hook")(seeing(seen, 2)),
    "all-pre": lambda net, seen: of_all("forward_pre_hook")(seeing(seen)),
    "all-backward": lambda net, seen: of_all("full_backward_hook")(seeing(seen)),
    "all-backward-pre": lambda net, seen: of_all("full_backward_pre_hook")(seeing(seen)),
    "own-forward": lambda net, seen: setattr(net, "forward", twice(seen, net.forward)),
    "own-call": lambda net, seen: setattr(net, "_call_impl", twice(seen, net._call_impl)),
    "own-call-of-a-layer": lambda net, seen: setattr(net[0], "_call_impl", twice(seen, net[0]._call_impl)),
    "own-call-of-an-activation": lambda net, seen: setattr(net[1], "_call_impl", twice(seen, net[1]._call_impl)),
}


@pytest.mark.parametrize("name", CALLS)
def test_whatever_a_call_of_the_sequential_runs(name, size):
    found = []
    for net in pairs():
        torch.manual_seed(0)
        seen, x = [], torch.randn(7, 4, requires_grad=True)
        handle = CALLS[name](net, seen)
        try:
            for _ in range(2):
                net(x).square().sum().backward()
        finally:
            if hasattr(handle, "remove"):
                handle.remove()
        found.append(([x.grad, *[p.grad for p in net.parameters()]], seen))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] != []


@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
def test_patched_calls_of_all_modules(name, size, monkeypatch):
    model, twin = pairs()
    x, seen, was = torch.randn(3, 4), [], getattr(nn.Module, name)
    monkeypatch.setattr(nn.Module, name, lambda module, *args: twice(seen, was)(module, *args))
    same(model, twin, x)
    assert len(seen) == 2 * 5


@pytest.mark.parametrize("name", ["__call__", "_call_impl", "forward"])
@pytest.mark.parametrize("make", [lambda: MLP([4, 8, 4]), lambda: fused(Tower()), lambda: pairs()[0]])
def test_classes_of_sequentials_with_calls_of_their_own(name, make, size, monkeypatch):
    model, x = make(), torch.randn(3, 4)
    y, seen, kind = model(x), [], type(model)
    was = getattr(kind, name)
    own = type("Own", (kind,), {name: lambda module, x: twice(seen, was)(module, x), "__module__": __name__})
    model.__class__ = own
    torch.testing.assert_close(model(x), 2 * y)
    model.__class__ = kind
    torch.testing.assert_close(model(x), y)
    monkeypatch.setattr(kind, name, lambda module, x: twice(seen, was)(module, x))
    torch.testing.assert_close(model(x), 2 * y)
    assert seen == [1, 1]


class Counts(nn.Module):
    """A mixin that stands behind the classes of Sequentials, and hears of their calls."""

    calls = 0

    def __call__(self, *args):
        self.calls += 1
        return super().__call__(*args)


class Logs(nn.Module):
    """Sees what is asked of it."""

    seen: ClassVar[list] = []

    def __getattribute__(self, name):
        if name in ("forward", "_call_impl"):
            self.seen.append(name)
        return super().__getattribute__(name)


class CountedMLP(MLP, Counts):
    pass


class LoggedMLP(Logs, MLP):
    pass


class CompiledMLP(MLP):
    def _compiled_call_impl(self, x):
        return 2 * self._call_impl(x)


def test_calls_of_classes_behind():
    model, x = CountedMLP([4, 8, 4]), torch.randn(3, 4)
    for calls in range(1, 4):
        model(x)
        assert model.calls == calls
    model, _ = pairs()
    model.__class__ = type("Swapped", (type(model), Counts), {})
    for calls in range(1, 4):
        model(x)
        assert model.calls == calls
    model = LoggedMLP([4, 8, 4])
    model(x), Logs.seen.clear(), model(x)
    assert sorted(set(Logs.seen)) == ["_call_impl", "forward"]
    model = CompiledMLP([4, 8, 4])
    assert [torch.equal(model(x), 2 * model.forward(x)) for _ in range(3)] == [True] * 3


def test_hooks_that_are_kept_elsewhere():
    class Elsewhere(nn.Sequential):
        @property
        def _forward_hooks(self):
            return self.__dict__.setdefault("mine", OrderedDict())

        @_forward_hooks.setter
        def _forward_hooks(self, hooks):
            self.__dict__["mine"] = hooks

    model, x = fused(Elsewhere(nn.Linear(4, 4), nn.Sigmoid())), torch.randn(3, 4)
    y = model(x)
    model.register_forward_hook(lambda module, args, y: 2 * y)
    torch.testing.assert_close(model(x), 2 * y)


@pytest.mark.parametrize("name", ["__call__", "_call_impl"])
@pytest.mark.parametrize("kind", [nn.Linear, nn.Sigmoid, nn.Tanh])
def test_patched_calls_of_classes_in_a_chain(kind, name, size, monkeypatch):
    model, twin = pairs()
    seen, was = [], getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda module, *args: twice(seen, was)(module, *args))
    same(model, twin)
    assert len(seen) == (4 if kind is nn.Linear else 2)


@pytest.mark.parametrize(
    ("space", "name"),
    [(F, "linear"), (torch, "sigmoid"), (torch, "tanh"), (F, "relu")],
    ids=["linear", "sigmoid", "tanh", "relu"],
)
def test_replaced_functions(space, name, size, monkeypatch):
    """As profilers do that count operations."""
    layers = [(nn.Linear(4, 4), kind()) for kind in (nn.ReLU, nn.ReLU, nn.Sigmoid, nn.Tanh)]
    model, twin = twins(*[module for pair in layers for module in pair])
    seen = []
    monkeypatch.setattr(space, name, twice(seen, getattr(space, name)))
    same(model, twin)
    assert seen
    assert len(seen) % 2 == 0


@pytest.mark.parametrize("index", [0, 1], ids=["layer", "identity"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook"])
def test_what_a_hook_keeps_is_written_over_as_in_torch(kind, index, size):
    kept = []
    model, twin = twins(nn.Linear(4, 8), nn.Identity(), nn.ReLU(inplace=True), nn.Linear(8, 4), nn.ReLU(inplace=True))
    x = torch.randn(7, 4)
    for net in (model, twin):
        getattr(net[index], kind)(lambda module, *given: kept.append(given[-1]))
        net(x)
    torch.testing.assert_close(*kept)


@pytest.mark.filterwarnings("ignore:.*Profiler clears events", "ignore::FutureWarning")
def test_a_profile_names_the_network():
    seen = []
    for net in pairs():
        with torch.profiler.profile(with_stack=True, with_modules=True) as profile:
            net(torch.randn(3, 4))
        names = {event.name() for event in profile.profiler.kineto_results.events()}
        seen.append(f"nn.Module: {type(net).__name__}_0" in names)
    assert seen[0] == seen[1]  # some releases show no modules


def test_arguments_of_a_call():
    model, twin = pairs()
    x, messages = torch.randn(3, 4), []
    torch.testing.assert_close(model(input=x), model(x), rtol=0, atol=0)
    for net in (model, twin):
        for args, options in (((), {}), ((x, x), {}), ((x,), {"input": x}), ((x,), {"mask": x}), ((), {"x": x})):
            with pytest.raises(TypeError) as caught:
                net(*args, **options)
            messages.append(str(caught.value))
        net.register_forward_pre_hook(lambda module, args, options: ((args[0] + options["add"],), {}), with_kwargs=True)
    assert messages[:5] == [message.replace("Sequential", "FusedSequential") for message in messages[5:]]
    torch.testing.assert_close(model(x, add=1), twin(x, add=1))


@pytest.mark.parametrize("watched", [F.linear, torch.tanh, F.relu], ids=["linear", "tanh", "relu"])
@pytest.mark.parametrize("width", [4, 512])
def test_modes_and_classes_that_replace_functions(watched, width):
    class Doubles(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            y = function(*args, **(kwargs or {}))
            return 2 * y if function is watched else y

    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            y = super().__torch_function__(function, types, args, kwargs or {})
            return 2 * y if function is watched else y

    class Wrapped:
        """What is no tensor, but takes part in its functions."""

        def __init__(self, value):
            self.value = value

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            args = [arg.value if isinstance(arg, Wrapped) else arg for arg in args]
            return Wrapped(function(*args, **(kwargs or {})) * (2 if function is watched else 1))

    activation = nn.ReLU if watched is F.relu else nn.Tanh
    model, twin = twins_of(width, activation)
    x = torch.randn(600, width)
    with Doubles():
        results = model(x), twin(x)
    torch.testing.assert_close(*results)
    with torch.device("cpu"):  # a mode too
        torch.testing.assert_close(model(x), twin(x))
    torch.testing.assert_close(*(net(x.as_subclass(Doubled)).as_subclass(torch.Tensor) for net in (model, twin)))
    torch.testing.assert_close(*(net(Wrapped(x)).value for net in (model, twin)))


class Wrapped:
    """What is no tensor, and answers nothing but torch's functions."""

    def __init__(self, value):
        self.value = value

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return cls(function(*[arg.value if isinstance(arg, cls) else arg for arg in args], **(kwargs or {})))


class Strict(torch.Tensor):
    """A tensor that takes part in two functions, and does not even tell its shape."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function not in (F.linear, torch.tanh):
            return NotImplemented
        return super().__torch_function__(function, types, args, kwargs or {})


class Raising(Strict):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function not in (F.linear, torch.tanh):
            raise NotImplementedError(function)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("kind", ["layers", "fused", "MLP"])
@pytest.mark.parametrize(
    ("answering", "operand"),
    [(Wrapped, "input"), *itertools.product([Strict, Raising], ["input", "weight", "bias"])],
)
@pytest.mark.parametrize("width", [4, 512])
def test_classes_that_answer_some_functions(kind, answering, operand, width):
    fused, twin = twins_of(width)
    model = {"layers": nn.Sequential(LinearTanh(width, width), LinearTanh(width, width)), "fused": fused}.get(
        kind, MLP([width] * 3, "tanh", "tanh")
    )
    for own, given in zip(model.parameters(), twin.parameters(), strict=True):
        own.data = given.data
    x, as_one = torch.randn(600, width), Wrapped if answering is Wrapped else lambda t: t.as_subclass(answering)
    results = []
    for net in (model, twin):
        if operand != "input":
            net[0]._parameters[operand] = as_one(net[0]._parameters[operand].detach())
        y = net(as_one(x) if operand == "input" else x)
        assert type(y) is answering
        results.append(y.value if answering is Wrapped else torch.Tensor.as_subclass(y, torch.Tensor))
    torch.testing.assert_close(*results)


def twins_of(width, activation=nn.Tanh):
    twin = nn.Sequential(nn.Linear(width, width), activation(), nn.Linear(width, width), activation())
    return fused(copy.deepcopy(twin)), twin


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_tensors(size):
    model, twin = twins_of(4)
    x = torch.nested.nested_tensor([torch.randn(3, 4), torch.randn(5, 4)])
    torch.testing.assert_close(*(net(x).unbind() for net in (model, twin)))


@pytest.mark.parametrize("width", [4, 512])
@pytest.mark.parametrize("mode", ["duals", "jvp"])
def test_a_backward_pass_that_is_differentiated_forwards(mode, width):
    """The forward pass knew nothing of it."""
    found, x = [], torch.randn(600, width, requires_grad=True)
    for net in (*twins_of(width), LinearReLU(width, width)):
        y = net(x)
        v, inputs = (torch.ones_like(y), y.detach().cos()), [x, *net.parameters()]
        pull = functools.partial(torch.autograd.grad, y, inputs, retain_graph=True)
        if mode == "jvp":
            found.append(torch.func.jvp(pull, v[:1], v[1:])[1])
            continue
        with forward_ad.dual_level():
            found.append([forward_ad.unpack_dual(g).tangent for g in pull(forward_ad.make_dual(*v))])
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
    # Linear in the gradient that comes from above.
    torch.testing.assert_close(found[2], pull(v[1]), rtol=1e-3, atol=1e-4)


def test_names_belong_to_others():
    class Tower2(Tower):
        unfused = "mine"

        def steps(self):
            return "mine"

    model = fused(Tower2())
    assert (model.steps(), model.unfused) == ("mine", "mine")
    for net in (MLP([4, 8, 2]), fused(Tower())):
        net.steps = 3
        net.add_module("unfused", nn.Sigmoid())
        torch.testing.assert_close(net(torch.ones(4)), nn.Sequential(*net)(torch.ones(4)))


def test_registries_and_states_of_subclasses():
    class Registered(Tower):
        known: ClassVar[list] = []

        def __init_subclass__(cls, *, name, **options):
            cls.known.append(name)
            super().__init_subclass__(**options)

        def __getstate__(self):
            return [dict(self.__dict__)]

        def __setstate__(self, state):
            super().__setstate__(state[0])

    class Sub(Registered, name="sub"):
        pass

    model, x = fused(Sub()), torch.randn(3, 4)
    assert Registered.known == ["sub"]
    model(x)
    other = copy.deepcopy(model)
    other[1] = nn.Tanh()
    torch.testing.assert_close(other(x), nn.Sequential(*other)(x))


def test_modules_with_an_equality_of_their_own(size):
    class Scale(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def __eq__(self, other):
            return isinstance(other, Scale)

        __hash__ = nn.Module.__hash__

        def forward(self, x):
            return self.factor * x

    model, twin = pairs(Scale(2))
    x = torch.randn(3, 4)
    for net in (model, twin):
        net[4] = Scale(3)
    torch.testing.assert_close(model(x), twin(x))


def test_a_hook_moves_what_goes_on():
    """As between the halves of a model on two devices."""
    model, twin = pairs()
    for net in (model, twin):
        net[2].to("meta")
        net[1].register_forward_hook(lambda module, args, y: y.to("meta"))
    assert model(torch.randn(3, 4)).device == twin(torch.randn(3, 4)).device == torch.device("meta")


def test_a_weight_on_another_device_behind_a_hook():
    model, _ = pairs()
    model[0].register_forward_hook(lambda *_: None)
    model[2].to("meta")
    with pytest.raises(ValueError, match="weight is on meta, but x on cpu"):
        model(torch.randn(3, 4))


def test_a_lazy_layer_is_fused_once_it_is_one(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LazyLinear(4), nn.Sigmoid())
    assert fuse_(model) == ["0"]
    assert len(steps_of(model)) == 3
    model(torch.randn(3, 4))
    assert len(steps_of(model)) == 1


# --- tools that look at modules -----------------------------------------------------------------------------------


def test_apply_finds_the_layers():
    model = MLP([4, 8, 2])
    found = []
    model.apply(lambda module: found.append(module) if type(module) is nn.Linear else None)
    assert found == [model[0], model[2]]


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_quantize_dynamic_finds_the_layers():
    model, twin = pairs()
    x = torch.randn(3, 4)
    quantized = [torch.ao.quantization.quantize_dynamic(net, {nn.Linear}) for net in (model, twin)]
    assert [type(m) for m in quantized[0]] == [type(m) for m in quantized[1]]
    assert type(quantized[0][0]) is not nn.Linear
    torch.testing.assert_close(*(net(x) for net in quantized))


def test_rescaled_gradients_of_activations(size):
    """DeepLift's rule, by hooks that put the slope between two inputs in the place of each activation's derivative."""
    model, twin = pairs()
    x = torch.randn(3, 4)

    def attributions(net):
        seen, handles = {}, []

        def keep(module, args, y):
            seen[module] = (args[0].detach(), y.detach())

        def rescale(module, grad_input, grad_output):
            (z, z0), (y, y0) = (t.chunk(2) for t in seen[module])
            slope = ((y - y0) / (z - z0)).repeat(2, 1)
            return (grad_output[0] * slope,)

        for module in net:
            if isinstance(module, (nn.Sigmoid, nn.Tanh)):
                handles += [module.register_forward_hook(keep), module.register_full_backward_hook(rescale)]
        both = torch.cat([x, torch.zeros_like(x)]).requires_grad_()
        y = net(both)
        (gradient,) = torch.autograd.grad(y[:3, 0].sum(), both)
        for handle in handles:
            handle.remove()
        return (gradient[:3] * x).sum(1), y[:3, 0] - y[3:, 0]

    found, difference = attributions(model)
    torch.testing.assert_close(found, attributions(twin)[0])
    torch.testing.assert_close(found, difference)  # the attributions add up to it: DeepLift's delta is 0


# --- copies -------------------------------------------------------------------------------------------------------

COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": lambda net: copy.copy(net),
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "save": lambda net: torch.load(saved(net), weights_only=False),
}


def saved(net):
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    return file


class Tower(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.Sigmoid())


def fused(net):
    assert fuse_(net)
    return net


COPIED = {
    "mlp": lambda: MLP([4, 8, 2]),
    "fused": lambda: fused(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4), nn.Tanh())),
    "subclass": lambda: fused(Tower()),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("make", COPIED.values(), ids=COPIED)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_copies_compute_with_their_own_parameters(make, copied, compiled):
    model, x = make(), torch.randn(3, 4)
    if compiled:
        model.compile(backend="eager")
    before = model(x)
    other = copied(model)
    assert type(other) is type(model)
    assert "_fused_plan" not in other.__dict__  # which would hold on to the modules
    torch.testing.assert_close(other(x), before)
    other[2] = nn.Linear(8, 4)
    with torch.no_grad():
        other[0].weight.data = other[0].weight + 1
    torch.testing.assert_close(other(x), nn.Sequential(*other)(x))
    assert not torch.allclose(other(x), before) if other(x).shape == before.shape else True
    if copied is not COPIES["copy"]:  # which shares what the modules hold, as torch's own does
        torch.testing.assert_close(model(x), before)
    assert unfuse_(other) == ([] if isinstance(other, MLP) else ["0", "2"])


def test_a_moving_average_of_a_compiled_network():
    model, x = MLP([4, 8, 2]), torch.randn(3, 4)
    model.compile(backend="eager")
    average = AveragedModel(model)
    before = average(x)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    torch.testing.assert_close(average(x), before)


# --- TorchScript and per-sample gradients -------------------------------------------------------------------------


class Mixed(nn.Module):
    def __init__(self, script):
        super().__init__()
        self.own, self.body = script(Tower()), nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x):
        return self.body(self.own(x))


SCRIPTS = {"script": torch.jit.script, "trace": lambda net: torch.jit.trace(net, torch.randn(3, 4))}


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_scripted_parts_are_left_alone(script):
    model, x, refused = Mixed(script), torch.randn(3, 4), {}
    expected = model(x)
    assert fuse_(model, refused) == ["body.0"]
    assert refused == {"own.0": "it is scripted", "own.2": "it is scripted"}
    torch.testing.assert_close(model(x), expected)
    network = MLP([4, 8, 4]).append(model.own)
    torch.testing.assert_close(network(x), model.own(network[:-1](x)))
    assert fuse_(model.own) == []


MADE = {
    "layer": lambda n: LinearSigmoid(n, n),
    "mlp": lambda n: MLP([n, n, n], "tanh"),
    "fused": lambda n: fused(nn.Sequential(nn.Linear(n, n), nn.ReLU(), nn.Linear(n, n), nn.Tanh())),
}


@pytest.mark.slow
@pytest.mark.parametrize("width", [4, 512])
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
@pytest.mark.parametrize("grad", [True, False])
def test_a_trace_passes_its_own_check(make, width, grad):
    model, x = make(width), torch.randn(600, width)
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, x)
    torch.testing.assert_close(traced(x), model(x))


def test_a_trace_records_calls_of_modules():
    model, twin = pairs()
    x = torch.randn(3, 4)
    for nets in ((model, twin), [nn.Sequential(net, nn.Softmax(-1)) for net in (model, twin)]):
        assert torch.jit.trace(nets[0], x).code == torch.jit.trace(nets[1], x).code


def test_compiled_in_place_after_calls(size):
    model, _ = pairs()
    y, seen = model(x := torch.randn(3, 4)), []
    model.compile(backend=lambda graph, _: lambda *args: (twice(seen, lambda: graph(*args)[0])(),))
    torch.testing.assert_close(model(x), 2 * y)
    assert seen == [1]


@pytest.mark.parametrize("make", [MADE["mlp"], MADE["fused"]], ids=["mlp", "fused"])
def test_scripted_after_fusing(make):
    model, x = make(4), torch.randn(3, 4)
    torch.testing.assert_close(torch.jit.script(model)(x), model(x))


def doubled(module, x: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    return 2 * y


class Exporting(nn.Sequential):
    def __init__(self, *modules):
        super().__init__(*modules)
        self.scale = 3.0
        self.register_buffer("shift", torch.ones(1))

    @torch.jit.export
    def scaled(self, x):
        return self.forward(x) * self.scale + self.shift


class Calling(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body.scaled(x)


@pytest.mark.parametrize("nested", [False, True], ids=["alone", "nested"])
def test_a_script_has_what_is_beside_the_modules(nested):
    inner = Exporting(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh()), nn.Linear(4, 2), nn.ReLU())
    model, x = fused(inner), torch.randn(3, 4)
    model.register_forward_hook(doubled)
    model.eval()
    kinds = [type(module) for module in model.modules()]
    whole = Calling(model) if nested else model
    scripted, expected = torch.jit.script(whole), (whole if nested else model)(x)
    torch.testing.assert_close(scripted(x), expected)
    if not nested:
        assert not scripted.training
        torch.testing.assert_close(scripted.scaled(x), model.scaled(x))
        torch.jit.freeze(scripted)  # which takes modules in evaluation alone
        assert [type(module) for module in model.modules()] == kinds
    model.append(nn.Linear(2, 2))
    assert model(x).shape == (3, 2)


@pytest.mark.parametrize("hook", [None, 0, 1, 2, 3], ids=str)
def test_modules_that_do_nothing_between(hook):
    model, twin = (
        nn.Sequential(nn.Linear(4, 5), nn.Identity(), nn.Sigmoid(), nn.Identity(), nn.Linear(5, 2)) for _ in range(2)
    )
    twin.load_state_dict(model.state_dict())
    fused(model)
    x, seen = torch.randn(3, 4), []
    if hook is not None:
        for net in (model, twin):
            net[hook].register_forward_hook(lambda module, args, y: seen.append(module) or 2 * y)
    torch.testing.assert_close(model(x), twin(x))
    assert seen == ([] if hook is None else [model[hook], twin[hook]])


@pytest.mark.parametrize("width", [4, 512])
@pytest.mark.parametrize("frozen", [False, True], ids=["all", "biases"])
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
def test_per_sample_gradients(make, frozen, width):
    model, x = make(width), torch.randn(130, width)
    if frozen:
        for name, p in model.named_parameters():
            p.requires_grad_(name.endswith("bias"))
    twin = copy.deepcopy(model)
    call_for_per_sample_grads(model)(x).square().sum().backward()
    twin(x).square().sum().backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        if p.requires_grad:
            assert p.grad_sample.shape == (130, *p.shape)
            torch.testing.assert_close(p.grad_sample.sum(0), q.grad, rtol=1e-4, atol=1e-4)


# --- random trees -------------------------------------------------------------------------------------------------

W = 5  # the width of everything, so that all can stand anywhere


class Calls(nn.Module):
    """A forward that calls its layers as it likes."""

    def __init__(self):
        super().__init__()
        self.fc, self.act, self.body = nn.Linear(W, W), nn.Sigmoid(), nn.Sequential(nn.Linear(W, W), nn.Tanh())

    def forward(self, x):
        z = self.fc(x)
        return (z if self.training else self.act(z)) + torch.tanh(self.body[0](x)) + self.body(x)


class Doubles:
    """A hook that can be copied and pickled."""

    def __init__(self, pre):
        self.pre = pre

    def __call__(self, module, args, *y):
        return (2 * args[0],) if self.pre else 2 * y[0]


LEAVES = (nn.Sigmoid, nn.Tanh, nn.ReLU, nn.Identity, lambda: nn.ReLU(inplace=True), nn.GELU, Calls)


def leaf(rng):
    if rng.random() < 0.5:
        return rng.choice((nn.Linear, nn.Linear, nn.Linear, LinearSigmoid, Scaled))(W, W, rng.random() < 0.8)
    return rng.choice(LEAVES)()


def tree(rng, depth=0):
    children = [
        tree(rng, depth + 1) if depth < 2 and rng.random() < 0.2 else leaf(rng) for _ in range(rng.randint(1, 6))
    ]
    return nn.Sequential(*children)


def sequentials(model):
    return [m for m in model.modules() if isinstance(m, nn.Sequential) and len(m)]


def swap(net, rng):
    net[rng.randrange(len(net))] = leaf(rng)


def insert(net, rng):
    if list(net._modules) == [str(i) for i in range(len(net))]:  # a slice keeps its keys, which insert does not take
        net.insert(rng.randrange(len(net) + 1), leaf(rng))


def pop(net, rng):
    if len(net) > 1:
        net.pop(rng.randrange(len(net)))


def cut(net, rng):
    at = rng.randrange(len(net))
    net[at] = net[at:]


def wrap(net, rng):
    at = rng.randrange(len(net))
    if isinstance(net[at], nn.Linear):
        net[at] = LoRA(net[at])


def hook(net, rng):
    module = net[rng.randrange(len(net))]
    if rng.random() < 0.5:
        module._forward_hooks, module._forward_pre_hooks = OrderedDict(), OrderedDict()
    if rng.random() < 0.5:
        module.register_forward_hook(Doubles(pre=False))
    else:
        module.register_forward_pre_hook(Doubles(pre=True))


def unhook(net, rng):
    for module in net:
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()


def mode(net, rng):
    net.train(rng.random() < 0.5)
    net.requires_grad_(rng.random() < 0.8)


def tie(net, rng):
    a, b = rng.choice(list(net)), rng.choice(list(net))
    if type(a) is type(b) is nn.Linear:
        a._parameters = {"weight": b.weight, "bias": None}


def recast(net, rng):
    module = rng.choice(list(net))
    if type(module) in (nn.Sigmoid, nn.Tanh):
        module.__class__ = nn.Tanh if type(module) is nn.Sigmoid else nn.Sigmoid


def replaced_forward(net, rng):
    module = rng.choice(list(net))
    if isinstance(module, (nn.Sigmoid, nn.Tanh)):
        module.forward = torch.cos


CHANGES = (swap, insert, pop, cut, wrap, hook, unhook, mode, tie, recast, replaced_forward)
WHOLE = (copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net)), fuse_, unfuse_)


def outcome(net, x):
    try:
        return results(net, x)
    except RuntimeError as error:
        # A result that the backward pass needs was overwritten by what follows, as torch says too.
        if "modified by an inplace operation" not in str(error):
            raise
        return []


@pytest.mark.fuzz
@pytest.mark.parametrize("size", ["small", "large"], indirect=True)
def test_random_trees(size):
    trees = max(1, int(750 * cases.FUZZ_BUDGET))
    for seed in range(cases.FUZZ_SEED, cases.FUZZ_SEED + trees):
        rng = random.Random(f"{seed}-{size}")
        torch.manual_seed(seed)
        twin = tree(rng)
        model = copy.deepcopy(twin)
        fuse_(model)
        x, done = torch.randn(3, W), []
        for _ in range(6):
            where = f"FUZZ_SEED={seed}, {size}, after {done}:\n{model}\n{twin}"
            actual, expected = outcome(model, x), outcome(twin, x)
            assert len(actual) == len(expected), where
            assert all(cases.relative_error(a, e) < 1e-4 for a, e in zip(actual, expected, strict=True)), where
            if rng.random() < 0.2:
                change = rng.choice(WHOLE)
                made = change(model)
                model = made if isinstance(made, nn.Module) else model
            else:
                change, state = rng.choice(CHANGES), rng.random()
                for net in (model, twin):
                    own = random.Random(state)
                    torch.manual_seed(seed)
                    change(own.choice(sequentials(net)), own)
            done.append(getattr(change, "__name__", "pickle"))


class Built(nn.Sequential):
    """Made by its keywords, which copies need too."""

    def __new__(cls, *modules, name):
        made = super().__new__(cls)
        made.__dict__["name"] = name
        return made

    def __init__(self, *modules, name):
        super().__init__(*modules)

    def __getnewargs_ex__(self):
        return (), {"name": self.name}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", ["sequential", "subclass", "built"])
def test_pickles_of_every_protocol(kind, protocol):
    makers = {"sequential": nn.Sequential, "subclass": lambda *_: Tower(), "built": functools.partial(Built, name="a")}
    model = fused(makers[kind](nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 2), nn.Sigmoid()))
    copied = pickle.loads(pickle.dumps(model, protocol))
    x = torch.randn(3, model[0].in_features)
    assert type(copied) is type(model)
    assert torch.equal(copied(x), model(x))
    assert getattr(copied, "name", None) == getattr(model, "name", None)


def test_an_error_of_a_class_fuses_nothing():
    class Wants(type(nn.Sequential)):
        def __new__(cls, name, bases, body, *, title):
            return super().__new__(cls, name, bases, body)

        def __init__(cls, name, bases, body, *, title):
            super().__init__(name, bases, body)

    class Odd(nn.Sequential, metaclass=Wants, title="odd"):
        pass

    parts = [kind(nn.Linear(4, 4), nn.Sigmoid()) for kind in (nn.Sequential, Odd)]
    model = nn.ModuleList(parts)
    with pytest.raises(TypeError, match="title"):
        fuse_(model)
    assert [type(part) for part in parts] == [nn.Sequential, Odd]
