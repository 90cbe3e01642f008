# SPDX-License-Identifier: Apache-2.0
"""What fusing does for a model: which of its layers run fused, by which path, and how long the model takes."""

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ..kernels import explain
from .fusing import fuse_, linears, places
from .sequential import FusedSequential
from .training.pacing import PATIENCE_SECONDS, synchronize

__all__ = ["report"]

SECONDS = 1.0  # of measuring, on end, but at least ROUNDS
ROUNDS = 5


def report(model: nn.Module, example: Tensor | tuple) -> None:
    """Prints what `fuse_` does for the model: of each Linear whether it runs fused or why not and by which path at this
    size, and the times of the model before and after, measured in turns.

    example: what the model is called with, a Tensor or a tuple of arguments. Copies of both are used: the model is in
    the mode that it is in, and stays as it is, fused or not; torch's generators do not advance. Times are of one call,
    with the gradients of all parameters where the output has any: medians. A line on stderr shows progress if that is
    a terminal and it takes longer than two seconds.

    Raises TypeError if the model is no nn.Module or the example neither of these, ValueError if the model cannot be
    copied, and what a call of it raises.
    """
    if not isinstance(example, Tensor | tuple):
        raise TypeError(f"example must be a Tensor or a tuple of arguments, not {type(example).__name__}")
    for line in _lines(model, example if isinstance(example, tuple) else (example,)):
        print(line)


class Progress:
    """A line on stderr that says how much is done, if that is a terminal, and after PATIENCE_SECONDS."""

    def __init__(self) -> None:
        self.began, self.shown = time.perf_counter(), ""

    def show(self, done: float) -> None:
        line = f"report: {done:.0%}"
        if (
            line != self.shown
            and time.perf_counter() - self.began > PATIENCE_SECONDS
            and sys.stderr is not None
            and sys.stderr.isatty()
        ):
            print(f"\r{line}", end="", file=sys.stderr, flush=True)
            self.shown = line

    def close(self) -> None:
        if self.shown:
            print(f"\r{' ' * len(self.shown)}\r", end="", file=sys.stderr, flush=True)


def _lines(model: nn.Module, example: tuple) -> Iterator[str]:
    progress = Progress()
    plain, fused = _copy_of(model), _copy_of(model)
    fuse_(fused)
    for module in plain.modules():
        if isinstance(module, FusedSequential) and type(module).forward is FusedSequential.forward:
            module.__class__ = module._fused_from  # pyright: ignore[reportAttributeAccessIssue]
    devices = {t.device for t in (*tree_leaves(example), *model.parameters()) if isinstance(t, Tensor)}
    with torch.random.fork_rng([device.index for device in devices if device.type == "cuda"]):
        inputs = _inputs(plain, _copied(example))
        yield from _layers(fused, inputs)
        with closing(progress):
            before, after, passes = _times(plain, fused, example, devices, progress)
    yield f"\n{passes}: {_time(before)} before, {_time(after)} fused, {before / after:.2f}x"


def _copy_of(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever an attribute's own way of being copied raises
        why = f"{type(error).__name__}: {error}"
        for name, module in model.named_modules() if isinstance(model, nn.Module) else ():
            for attribute, value in vars(module).items():
                if any(isinstance(leaf, Tensor) and not leaf.is_leaf for leaf in tree_leaves(value)):
                    path = ".".join(filter(None, ("model", name, attribute)))
                    why = f"{path} holds a tensor with the graph that computed it, which torch does not copy"
        raise ValueError(f"model cannot be copied, and only copies are called and timed: {why}") from error


def _copied(example: tuple) -> tuple:
    """The example with copies of its tensors, over which the model may write.

    What is one tensor at several places stays one: attention computes otherwise where its key is its query.
    """
    copies = {id(leaf): leaf.clone() for leaf in tree_leaves(example) if isinstance(leaf, Tensor)}
    return tree_map(lambda leaf: copies.get(id(leaf), leaf), example)


def _inputs(model: nn.Module, example: tuple) -> dict[str, Tensor]:
    """What each Linear of the model is called with, by its qualified name, the last time if there are several."""
    found: dict[str, Tensor] = {}

    def keep(name: str, _: nn.Module, arguments: tuple) -> None:
        if arguments:
            found[name] = arguments[0].detach()

    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(partial(keep, name)) for name, module in layers]
    model(*example)
    for handle in handles:
        handle.remove()
    return found


def _layers(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[str]:
    """A line for each Linear; one for the path of each network or layer that runs fused."""
    width = max((len(name) for name, _ in linears(model)), default=0)
    paths = dict(_paths(model, inputs))
    for name, reason in linears(model):
        yield f"{name:{width}}  {'left alone: ' + reason if reason else 'fused'}"
        for line in paths.get(name, ()):
            yield f"{'':{width}}  {line}"


def _paths(model: nn.Module, inputs: dict[str, Tensor]) -> Iterator[tuple[str, list[str]]]:
    """The name of the first layer of what runs as one, and the lines of `explain` on it."""
    names = {id(module): name for name, module in model.named_modules()}
    for name, module in model.named_modules():
        for chain, children in places(module) if isinstance(module, FusedSequential) else ():
            if (x := inputs.get(names[id(chain.layers[0])])) is not None:
                shapes = [tuple(layer.weight.shape) for layer in chain.layers]
                plans = explain(tuple(x.shape), shapes if len(shapes) > 1 else shapes[0], x.dtype, x.device)
                what = f"a network of {len(shapes)} layers" if len(shapes) > 1 else "a layer"
                yield f"{name}.{children[0]}".lstrip("."), [f"{what} on x {tuple(x.shape)}", *str(plans).splitlines()]


def _times(
    plain: nn.Module, fused: nn.Module, example: tuple, devices: set[torch.device], progress: Progress
) -> tuple[float, float, str]:
    """(seconds of a call of each, medians over turns, what a call was)."""
    calls, backward = [], False
    for model in (plain, fused):
        progress.show(0)
        call, backward = _call(model, example)
        calls.append(call)
    seconds: tuple[list[float], list[float]] = ([], [])
    began = time.perf_counter()
    while (spent := time.perf_counter() - began) < SECONDS or len(seconds[0]) < ROUNDS:
        for call, own in zip(calls, seconds, strict=True):
            progress.show(min(1, spent / SECONDS, sum(map(len, seconds)) / (2 * ROUNDS)))
            arguments = _copied(example)  # anew, so that each call finds the same values in the same caches
            _wait(devices)
            start = time.perf_counter()
            call(arguments)
            _wait(devices)
            own.append(time.perf_counter() - start)
    before, after = map(statistics.median, seconds)
    return before, after, "forward and backward" if backward else "forward"


def _wait(devices: set[torch.device]) -> None:
    for device in devices:
        synchronize(device)


def _call(model: nn.Module, example: tuple) -> tuple[Callable[[tuple], object], bool]:
    """(one call of the model with arguments, whether that has a backward pass); the call has run once."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def sums(arguments: tuple) -> list[Tensor]:
        return [y.sum() for y in tree_leaves(model(*arguments)) if isinstance(y, Tensor) and y.requires_grad]

    def call(arguments: tuple) -> object:
        return torch.autograd.grad(sums(arguments), parameters, allow_unused=True)

    if not sums(_copied(example)) or not parameters:
        return lambda arguments: model(*arguments), False

    call(_copied(example))
    return call, True


def _time(seconds: float) -> str:
    return f"{1e3 * seconds:.2f} ms" if seconds > 1e-3 else f"{1e6 * seconds:.1f} us"
