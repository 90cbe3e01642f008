"""Whole training loops in plain torch: forward, backward and update written out, without autograd.

The CPU implementation, and the definition of correct for the training kernels. All buffers are made once; a step
is a list of calls that write into them. A bias is one more column of its weight, met by a 1 in the layer's input,
so a layer takes one product forward, one backward and one for its update. With h[0] = x and, for either cross entropy,
dz = p - t at the output:

    dz[l - 1] = (dz[l] @ weight[l]) * act'(h[l])        dweight[l] = dz[l].T @ h[l]
"""

import functools
import itertools
import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from . import plan as planning
from .activations import ACTIVATIONS, Activation
from .records import Recipe, TrainPlan

Call = Callable[[], object]


class Loop:
    """A run of training steps, in as many pieces as the caller likes: buffers and graphs are made once."""

    def __init__(
        self,
        recipe: Recipe,
        parameters: Sequence[Tensor],
        first: Sequence[Tensor],
        second: Sequence[Tensor],
        lr: Tensor,
        x: Tensor,
        y: Tensor,
        batch_size: int,
        taken: int,
        plan: TrainPlan,
    ) -> None:
        """parameters: w0, b0, w1, b1, ... (w0, w1, ... without biases), weights (E, N, K), biases (E, N). first,
        second: () or like parameters: momentum buffers, or Adam's two averages; not read if `taken`, the number of
        steps that they have seen, is 0. lr: (E,). x: (E or 1, samples, widths[0]), y: (E or 1, samples, widths[-1]); a
        leading 1 is shared. All of one dtype, float32 or float64. batch_size: at most `samples`. plan: says that this
        implementation was chosen.
        """
        self.given, self.device = (parameters, first, second), x.device
        self.size = min(batch_size, x.shape[1])
        self.per_epoch = -(-x.shape[1] // self.size)
        self.graph = plan.impl == "graph"
        choice = planning.train_loop(lr.shape[0], self.size, recipe, x.shape[0] == 1)
        self.one_thread = choice.one_thread and x.is_cpu
        make = _Arrays if choice.layout == "arrays" else partial(_Matrices, joint=choice.layout == "joint")
        with self._context():
            self.layout = make(recipe, parameters, x, y)
            self.optimizer = _Optimizer(self.layout, first, second, lr, taken, self.graph)
            self.batches: dict[int, _Batch] = {}

    def run(self, order: Tensor | None, start: int, steps: int, log_every: int, losses: Tensor) -> None:
        """Takes `steps` steps, the first being number `start` of the run; writes parameters, state and losses in place.

        order: None for full batches, or (epochs, samples), the order of the samples in each epoch from that of step
        `start` on. losses: (rows, E), one row per step s in [start, start + steps) with s % log_every == 0, from before
        its update.
        """
        pieces = None
        if order is not None:
            epochs = itertools.chain.from_iterable(epoch.split(self.size) for epoch in order)
            pieces = itertools.islice(epochs, start % self.per_epoch, None)
        rows = iter(losses)
        with self._context():
            batch = self._batch(self.size)
            if pieces is None and not batch.ran:
                batch.load(None)
            for step in range(start, start + steps):
                if pieces is not None:
                    indices = next(pieces)
                    batch = self._batch(len(indices))
                    batch.load(indices)
                self.optimizer.advance()
                if self.graph and batch.ran and not batch.captured:
                    batch.capture()
                for call in batch.calls:
                    call()
                batch.ran = True
                if log_every and step % log_every == 0:
                    # The outputs are still those from before the update.
                    next(rows).copy_(batch.loss())
            parameters, first, second = self.given
            self.layout.read(self.layout.parameters, parameters)
            self.optimizer.read(first, second)

    @contextmanager
    def _context(self) -> Iterator[None]:
        current = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        with torch.inference_mode(), current, _threads(self.one_thread):
            yield

    def _batch(self, size: int) -> "_Batch":
        if size not in self.batches:  # the last of an epoch may be smaller
            self.batches[size] = _Batch(self.layout, self.optimizer, size)
        return self.batches[size]


# --- threads -----------------------------------------------------------------------------------------------

_lock = threading.Lock()
_running = 0  # loops that have set one thread and not yet finished
_threads_before = 0  # torch's number before the first of them began


@contextmanager
def _threads(one: bool) -> Iterator[None]:
    """Runs on one thread if `one`, and gives torch its number back."""
    global _running, _threads_before
    if not one:
        yield
        return
    with _lock:
        _threads_before = _threads_before if _running else torch.get_num_threads()
        _running += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _running -= 1
            # Each Python thread has a number of its own, and one that began beside another loop has inherited the 1.
            torch.set_num_threads(_threads_before)


# --- layouts -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Storage:
    """Something for every parameter: the parameters themselves, their gradients, an optimizer's state."""

    whole: Tensor
    views: list[Tensor]  # one per layer, its weight and bias side by side


class _Layout(ABC):
    """Where the numbers of a network, or of a stack of them, lie, and which calls compute with them."""

    axis: int  # of x and y that counts samples

    def __init__(self, recipe: Recipe, parameters: Sequence[Tensor], x: Tensor, y: Tensor) -> None:
        self.recipe = recipe
        self.bias = int(recipe.bias)
        self.layers = list(itertools.pairwise(recipe.widths))  # (inputs, outputs)
        self.activations = [ACTIVATIONS[recipe.hidden]] * (len(self.layers) - 1) + [ACTIVATIONS[recipe.output]]
        self.like = parameters[0]
        self.members = self.like.shape[0]
        self.shared = x.shape[0] == 1
        self.x, self.y = self.samples(x, y)
        self.parameters = self.storage()
        self.write(self.parameters, parameters)

    @abstractmethod
    def samples(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """All samples, as batches are taken from them."""

    @abstractmethod
    def storage(self) -> _Storage:
        """A new storage of zeros."""

    @abstractmethod
    def blocks(self, view: Tensor, inputs: int) -> tuple[Tensor, Tensor | None]:
        """The weight (E, N, K) and the bias (E, N) in a layer's view."""

    @abstractmethod
    def parts(self, storage: _Storage) -> list[Tensor]:
        """The tensors of a storage that elementwise calls take, each of which a rate per member can multiply."""

    @abstractmethod
    def rates(self, lr: Tensor) -> Tensor:
        """lr (E,), in the shape that multiplies parts and dz member by member."""

    @abstractmethod
    def build(self, batch: "_Batch") -> None:
        """Makes the batch's buffers and its calls, as far as the gradients at each layer's output."""

    @abstractmethod
    def accumulate(self, batch: "_Batch", storage: _Storage, beta: float, alpha: float) -> list[Call]:
        """Calls for storage = beta * storage + alpha * (dz times input, summed over the batch)."""

    def load(self, inputs: Tensor, target: Tensor, indices: Tensor | None) -> None:
        """Copies the samples with these indices, or all of them."""
        if indices is None:
            inputs.copy_(self.x)
            target.copy_(self.y)
        else:
            torch.index_select(self.x, self.axis, indices, out=inputs)
            torch.index_select(self.y, self.axis, indices, out=target)

    def write(self, storage: _Storage, tensors: Sequence[Tensor]) -> None:
        for own, given in zip(self._blocks(storage), tensors, strict=True):
            own.copy_(given)

    def read(self, storage: _Storage, tensors: Sequence[Tensor]) -> None:
        for own, given in zip(self._blocks(storage), tensors, strict=True):
            given.copy_(own)

    def _blocks(self, storage: _Storage) -> Iterator[Tensor]:
        for view, (inputs, _) in zip(storage.views, self.layers, strict=True):
            weight, bias = self.blocks(view, inputs)
            yield weight
            if bias is not None:
                yield bias


_streams = threading.local()


def _capture_stream(device: torch.device) -> "torch.cuda.Stream":
    """A stream of this thread on this device. torch's own for captures is one for all, on the device that was first."""
    own: dict = _streams.__dict__.setdefault("by_device", {})
    if device not in own:
        own[device] = torch.cuda.Stream(device)
    return own[device]


class _Batch:
    """The buffers and calls of a step on a batch of one size."""

    inputs: list[Tensor]  # of each layer, with its ones
    dz: list[Tensor]  # of each layer, but for the factor `scale`
    output: Tensor  # of the last layer
    target: Tensor  # broadcasts to it
    summed: tuple[int, int]  # its dimensions but that of the members
    load: Callable[[Tensor | None], None]  # fetches the samples with these indices, or all
    whole_inputs: Tensor  # of a joint layout: those of all layers in one matrix
    whole_dz: Tensor

    def __init__(self, layout: _Layout, optimizer: "_Optimizer", size: int) -> None:
        self.recipe, self.size, self.dz_rates = layout.recipe, size, optimizer.dz_rates
        self.mean = 1 / (size * self.recipe.widths[-1]) if self.recipe.reduction == "mean" else 1.0
        self.scale = self.mean * (2 if self.recipe.loss == "mse" else 1)
        self.forward: list[Call] = []
        self.backward: list[Call] = []
        layout.build(self)
        self.backward += optimizer.calls(self)
        self.calls = self.forward + self.backward
        self.ran = self.captured = False

    def capture(self) -> None:
        """Puts one replay of a CUDA graph in the place of all calls of a step.

        They have run before: libraries set themselves up on their first call, which a capture does not bear. Capturing
        runs nothing.
        """
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=_capture_stream(self.output.device), capture_error_mode="thread_local"):
            for call in self.calls:
                call()
        self.calls = [graph.replay]
        self.captured = True

    def activate(self, activation: Activation, z: Tensor, out: Tensor) -> None:
        if z is not out or activation.name != "identity":
            self.forward.append(partial(activation.forward_into, z, out))

    def start_backward(self) -> None:
        p, t, dz = self.output, self.target, self.dz[-1]
        if self.recipe.loss == "bce_logits":
            self.backward += [partial(torch.sigmoid, p, out=dz), partial(torch.sub, dz, t, out=dz)]
        else:
            self.backward.append(partial(torch.sub, p, t, out=dz))
        if self.recipe.loss == "mse":
            self.through(ACTIVATIONS[self.recipe.output], dz, p)
        if self.dz_rates is not None:
            self.backward.append(partial(dz.mul_, self.dz_rates))

    def through(self, activation: Activation, dz: Tensor, h: Tensor) -> None:
        """dh in the place of dz becomes dz."""
        if activation.name != "identity":
            self.backward.append(partial(activation.backward_into, dz, h, dz))

    def loss(self) -> Tensor:
        """(E,)"""
        p, t = self.output, self.target
        if self.recipe.loss == "mse":
            values = (p - t).square_()
        elif self.recipe.loss == "bce":
            # Written out: torch's function raises at NaN, where a loop reports what it meets.
            values = -(t * p.log().clamp_min_(-100) + (1 - t) * torch.log1p(-p).clamp_min_(-100))
        else:
            values = torch.nn.functional.binary_cross_entropy_with_logits(p, t.expand_as(p), reduction="none")
        return values.sum(self.summed).mul_(self.mean)


class _Matrices(_Layout):
    """A layer is a matrix (N, K + 1), or a stack of them; its input is (K + 1, B), with ones in the last row.

    joint: one network only, with all layers on the diagonal of one matrix. One product then updates them all; what it
    leaves off the diagonal is never read.
    """

    axis = -2

    def __init__(self, recipe: Recipe, parameters: Sequence[Tensor], x: Tensor, y: Tensor, joint: bool) -> None:
        self.joint = joint
        super().__init__(recipe, parameters, x, y)

    def samples(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        self.stack = () if self.members == 1 else (self.members,)
        self.rows = [n for _, n in self.layers]
        self.columns = [k + self.bias for k, _ in self.layers]
        return x[0] if self.shared else x, y[0] if y.shape[0] == 1 else y

    def storage(self) -> _Storage:
        sizes = list(zip(self.rows, self.columns, strict=True))
        if self.joint:
            whole = self.like.new_zeros(sum(self.rows), sum(self.columns))
            corners = zip(itertools.accumulate(self.rows), itertools.accumulate(self.columns), strict=True)
            blocks = [whole[i - n : i, j - k : j] for (i, j), (n, k) in zip(corners, sizes, strict=True)]
            return _Storage(whole, blocks)
        counts = [self.members * n * k for n, k in sizes]
        whole = self.like.new_zeros(sum(counts))
        parts = zip(whole.split(counts), sizes, strict=True)
        return _Storage(whole, [part.view(*self.stack, n, k) for part, (n, k) in parts])

    def blocks(self, view: Tensor, inputs: int) -> tuple[Tensor, Tensor | None]:
        view = view if self.stack else view[None]
        return view[..., :inputs], view[..., inputs] if self.bias else None

    def parts(self, storage: _Storage) -> list[Tensor]:
        return storage.views if self.stack else [storage.whole]

    def rates(self, lr: Tensor) -> Tensor:
        return lr.view(-1, 1, 1)

    def build(self, batch: _Batch) -> None:
        new, ones, size = self.like.new_empty, self.like.new_ones, batch.size
        if self.joint:
            batch.whole_inputs, batch.whole_dz = ones(sum(self.columns), size), new(sum(self.rows), size)
            batch.inputs, batch.dz = list(batch.whole_inputs.split(self.columns)), list(batch.whole_dz.split(self.rows))
        else:
            # The first layer's input lies as the samples do.
            samples = ones(*self.x.shape[:-2], size, self.columns[0])
            batch.inputs = [samples.mT, *(ones(*self.stack, k, size) for k in self.columns[1:])]
            batch.dz = [new(*self.stack, n, size) for n in self.rows]
        batch.output = new(*self.stack, self.rows[-1], size)
        target = new(*self.y.shape[:-2], size, self.rows[-1])
        batch.target, batch.summed = target.mT, (-2, -1)
        batch.load = partial(self.load, batch.inputs[0][..., : self.layers[0][0], :].mT, target)

        outputs = [*(h[..., :n, :] for h, n in zip(batch.inputs[1:], self.rows, strict=False)), batch.output]
        for l, (weight, h, out) in enumerate(zip(self.parameters.views, batch.inputs, outputs, strict=True)):
            # A stack of products wants a dense result, which an input beside its ones is not.
            z = batch.dz[l] if self.stack and l < len(outputs) - 1 else out
            if self._as_one(l):
                batch.forward.append(partial(torch.mm, weight.flatten(0, 1), h, out=z.view(-1, size)))
            else:
                batch.forward.append(partial(torch.bmm if self.stack else torch.mm, weight, h, out=z))
            batch.activate(self.activations[l], z, out)
        batch.start_backward()
        for l in range(len(self.layers) - 1, 0, -1):
            dz, weight = batch.dz[l - 1], self.parameters.views[l][..., : self.layers[l][0]]
            batch.backward.append(partial(torch.bmm if self.stack else torch.mm, weight.mT, batch.dz[l], out=dz))
            batch.through(self.activations[l - 1], dz, outputs[l - 1])

    def _as_one(self, l: int) -> bool:
        """Whether the members' first layers are the rows of one matrix: they see the same samples."""
        return bool(self.stack) and self.shared and l == 0

    def accumulate(self, batch: _Batch, storage: _Storage, beta: float, alpha: float) -> list[Call]:
        if self.joint:
            return [partial(storage.whole.addmm_, batch.whole_dz, batch.whole_inputs.mT, beta=beta, alpha=alpha)]
        calls: list[Call] = []
        for l, (view, dz, h) in enumerate(zip(storage.views, batch.dz, batch.inputs, strict=True)):
            if self._as_one(l):
                calls.append(partial(view.flatten(0, 1).addmm_, dz.flatten(0, 1), h.mT, beta=beta, alpha=alpha))
            else:
                add = view.baddbmm_ if self.stack else view.addmm_
                calls.append(partial(add, dz, h.mT, beta=beta, alpha=alpha))
        return calls


class _Arrays(_Layout):
    """Every parameter is an array over the members: a layer is (K + 1, N, E), its input (B, K + 1, E).

    Products are sums of elementwise calls, but for that of the first layer if its samples are shared: its members are
    the columns of one matrix, and its input is (B, K + 1).
    """

    axis = 0

    def samples(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x[0] if self.shared else x.permute(1, 2, 0).contiguous(), y.permute(1, 2, 0).contiguous()

    def storage(self) -> _Storage:
        counts = [n * (k + self.bias) for k, n in self.layers]
        whole = self.like.new_zeros(sum(counts), self.members)
        parts = zip(whole.split(counts), self.layers, strict=True)
        return _Storage(whole, [part.view(-1, n, self.members) for part, (_, n) in parts])

    def blocks(self, view: Tensor, inputs: int) -> tuple[Tensor, Tensor | None]:
        return view[:inputs].permute(2, 1, 0), view[inputs].t() if self.bias else None

    def parts(self, storage: _Storage) -> list[Tensor]:
        return [storage.whole]

    def rates(self, lr: Tensor) -> Tensor:
        return lr

    def build(self, batch: _Batch) -> None:
        new, ones, size = self.like.new_empty, self.like.new_ones, batch.size
        samples = ones(size, self.layers[0][0] + self.bias, *self.x.shape[2:])
        batch.inputs = [samples, *(ones(size, k + self.bias, self.members) for k, _ in self.layers[1:])]
        batch.dz = [new(size, n, self.members) for _, n in self.layers]
        batch.output = new(size, self.layers[-1][1], self.members)
        batch.target, batch.summed = new(size, *self.y.shape[1:]), (0, 1)
        batch.load = partial(self.load, samples[:, : self.layers[0][0]], batch.target)

        outputs = [*(h[:, :n] for h, (_, n) in zip(batch.inputs[1:], self.layers, strict=False)), batch.output]
        for l, (view, h, out) in enumerate(zip(self.parameters.views, batch.inputs, outputs, strict=True)):
            z, (k, _) = batch.dz[l], self.layers[l]
            if l == 0 and self.shared:
                batch.forward.append(partial(torch.mm, h, view.flatten(1), out=z.view(size, -1)))
            else:
                terms = [(view[i], h[:, i : i + 1]) for i in range(k)]
                batch.forward += _sum_of_products(terms, z, view[k] if self.bias else None)
            batch.activate(self.activations[l], z, out)
        batch.start_backward()
        for l in range(len(self.layers) - 1, 0, -1):
            (k, n), dz, view = self.layers[l], batch.dz[l - 1], self.parameters.views[l]
            terms = [(view[:k, i], batch.dz[l][:, i : i + 1]) for i in range(n)]
            batch.backward += _sum_of_products(terms, dz, None)
            batch.through(self.activations[l - 1], dz, outputs[l - 1])

    def accumulate(self, batch: _Batch, storage: _Storage, beta: float, alpha: float) -> list[Call]:
        calls: list[Call] = []
        for l, (view, dz, h) in enumerate(zip(storage.views, batch.dz, batch.inputs, strict=True)):
            if l == 0 and self.shared:
                calls.append(partial(view.flatten(1).addmm_, h.t(), dz.flatten(1), beta=beta, alpha=alpha))
                continue
            if beta == 0:
                calls.append(view.zero_)  # multiplied by 0, a NaN would stay
            elif beta != 1:
                calls.append(partial(view.mul_, beta))
            for own, gradient in zip(h, dz, strict=True):
                calls.append(partial(view.addcmul_, own[:, None], gradient[None], value=alpha))
        return calls


def _sum_of_products(terms: list[tuple[Tensor, Tensor]], out: Tensor, bias: Tensor | None) -> list[Call]:
    """Calls for out = sum of a * b over the terms, plus bias."""
    (a, b), *rest = terms
    begin = partial(torch.mul, a, b, out=out) if bias is None else partial(torch.addcmul, bias, a, b, out=out)
    return [begin, *(partial(out.addcmul_, a, b) for a, b in rest)]


# --- optimizers --------------------------------------------------------------------------------------------


@functools.cache
def _fused_adam() -> dict[str, Callable]:
    """torch's own Adam and AdamW steps in one call each, or {} where this torch has none that work on a CPU.

    The functions are private, so they are tried once, on the first step from w = 1 with a gradient of 1.
    """
    try:
        names = {"adam": "_fused_adam_", "adamw": "_fused_adamw_"}
        functions = {optimizer: getattr(torch, name) for optimizer, name in names.items()}
        for function in functions.values():
            w, g, m, v = (torch.full((3,), value, device="cpu", dtype=torch.float32) for value in (1, 1, 0, 0))
            _call_fused(function, w, g, m, v, torch.ones((), device="cpu", dtype=torch.float32), 0.5, Recipe((1, 1)))
            found = torch.stack([w, m, v]).mean(1).tolist()
            if any(not math.isclose(a, b, rel_tol=1e-5) for a, b in zip(found, (0.5, 0.1, 0.001), strict=True)):
                return {}
        return functions
    except Exception:  # whatever a private function may raise, the answer is the same: do without it
        return {}


def _call_fused(function, w, g, m, v, step: Tensor, lr: float, recipe: Recipe) -> None:
    function(
        [w],
        [g],
        [m],
        [v],
        [],
        [step],
        lr=lr,
        beta1=recipe.beta1,
        beta2=recipe.beta2,
        weight_decay=recipe.weight_decay,
        eps=recipe.eps,
        amsgrad=False,
        maximize=False,
    )


class _Optimizer:
    """The optimizer's state, and the calls that update it and the parameters, by the formulas of torch.optim."""

    def __init__(
        self, layout: _Layout, first: Sequence[Tensor], second: Sequence[Tensor], lr: Tensor, taken: int, graph: bool
    ) -> None:
        self.recipe, self.layout, self.taken, self.graph = layout.recipe, layout, taken, graph
        self.stateless = not first
        # One network's rate is a number, those of a stack are a tensor.
        self.rate = lr.item() if layout.members == 1 else 0.0
        self.rates = layout.rates(lr) if layout.members > 1 else None
        self.keep = 1 - (self.rate if self.rates is None else self.rates) * self.recipe.weight_decay
        # Gradients are linear in dz of the output: scaled there, where there is least to scale, they go straight into
        # the parameters.
        self.dz_rates = self.rates if self.stateless else None
        if self.stateless:
            return
        self.gradients, self.first = layout.storage(), layout.storage()
        if taken:
            layout.write(self.first, first)
        storages = [layout.parameters, self.gradients, self.first]
        if second:
            self.second = layout.storage()
            if taken:
                layout.write(self.second, second)
            storages.append(self.second)
            self.step = torch.zeros((), dtype=torch.float32, device=lr.device)
            # What changes from step to step, where a captured step finds it.
            self.factor, self.floor = lr.new_empty(()), lr.new_empty(())
        self.parts = list(zip(*map(layout.parts, storages), strict=True))

    def read(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> None:
        if first:
            self.layout.read(self.first, first)
        if second:
            self.layout.read(self.second, second)

    def advance(self) -> None:
        """One more step: what changes with their number, outside of the calls, which a graph freezes."""
        self.taken += 1
        if self.graph and self.recipe.optimizer != "sgd":
            factor, floor = self._corrections()
            self.factor.fill_(factor)
            self.floor.fill_(floor)

    def _corrections(self) -> tuple[float, float]:
        """lr (m / c1) / (sqrt(v) / c2 + eps) is -factor lr m / (sqrt(v) + floor)."""
        recipe = self.recipe
        c1, c2 = 1 - recipe.beta1**self.taken, math.sqrt(1 - recipe.beta2**self.taken)
        return -c2 / c1, recipe.eps * c2

    def calls(self, batch: _Batch) -> list[Call]:
        recipe, layout = self.recipe, self.layout
        if not self.stateless and recipe.optimizer == "sgd" and not recipe.nesterov and not recipe.dampening:
            # From zeros, this makes the gradient itself of the first buffer, as torch does.
            return [*layout.accumulate(batch, self.first, recipe.momentum, batch.scale), self._plain_momentum]
        if not self.stateless:
            update = self._momentum if recipe.optimizer == "sgd" else self._adam
            return [*layout.accumulate(batch, self.gradients, 0, batch.scale), update]
        if self.rates is None:
            beta, alpha = 1 - self.rate * recipe.weight_decay, -self.rate * batch.scale
            return layout.accumulate(batch, layout.parameters, beta, alpha)
        decay: list[Call] = []
        if recipe.weight_decay:
            decay = [partial(part.mul_, self.keep) for part in layout.parts(layout.parameters)]
        return decay + layout.accumulate(batch, layout.parameters, 1, -batch.scale)

    def _momentum(self) -> None:
        recipe = self.recipe
        for w, g, m in self.parts:
            if recipe.weight_decay:
                g.add_(w, alpha=recipe.weight_decay)
            if self.taken > 1:
                m.mul_(recipe.momentum).add_(g, alpha=1 - recipe.dampening)
            else:
                m.copy_(g)
            self._descend(w, g.add_(m, alpha=recipe.momentum) if recipe.nesterov else m)

    def _plain_momentum(self) -> None:
        for w, _, m in self.parts:
            if self.recipe.weight_decay:
                m.add_(w, alpha=self.recipe.weight_decay)
            self._descend(w, m)

    def _descend(self, w: Tensor, direction: Tensor) -> None:
        if self.rates is None:
            w.add_(direction, alpha=-self.rate)
        else:
            w.addcmul_(direction, self.rates, value=-1)

    def _adam(self) -> None:
        recipe = self.recipe
        mine = self.graph or not self.step.is_cpu or self.rates is not None
        fused = None if mine else _fused_adam().get(recipe.optimizer)
        if fused is not None:
            self.step.fill_(self.taken)
            for w, g, m, v in self.parts:
                _call_fused(fused, w, g, m, v, self.step, self.rate, recipe)
            return
        factor, floor = (self.factor, self.floor) if self.graph else self._corrections()
        for w, g, m, v in self.parts:
            if recipe.weight_decay and recipe.optimizer == "adam":
                g.add_(w, alpha=recipe.weight_decay)
            elif recipe.weight_decay:
                w.mul_(self.keep)
            m.lerp_(g, 1 - recipe.beta1)
            v.mul_(recipe.beta2).addcmul_(g, g, value=1 - recipe.beta2)
            torch.div(m, torch.sqrt(v, out=g).add_(floor), out=g).mul_(factor)
            if self.rates is None:
                w.add_(g, alpha=self.rate)
            else:
                w.addcmul_(g, self.rates)
