# SPDX-License-Identifier: Apache-2.0
"""`torch.compile(model, backend="perceptriton")`: fused layers and networks in any model, Inductor for all the rest.

Dynamo captures what a model calls, and guards it. In that graph a linear layer becomes one op with the sigmoid, tanh or
relu that alone takes its output, and so does a chain of such layers that kernels take as a whole, with or without an
activation behind the last, or with the binary cross entropy of its logits. What plain operations do as fast stays as it
is. The graph then goes to an inner compiler.
"""

import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn
from torch.fx import GraphModule

from .fuse import Found, fuse

__all__ = ["Found", "explain", "perceptriton"]

log = logging.getLogger(__name__)


def perceptriton(
    gm: GraphModule, example_inputs: list, *, mode: str | None = None, options: dict[str, Any] | None = None
) -> Any:
    """The backend that torch.compile knows by this name: fuses what it finds in a captured graph, and compiles it.

    mode: of the inner compiler, as "reduce-overhead" is one of Inductor's. options: "backend", the inner compiler, by
    name or a function, Inductor unless told otherwise; "mode", because torch.compile takes a mode or options, not both;
    all others are the inner compiler's own. What becomes of each linear layer is logged at the level INFO; `explain`
    returns it.
    """
    own = dict(options or {})
    inner: Any = own.pop("backend", "inductor")
    mode = own.pop("mode", mode)
    if inner == "inductor":
        inductor = torch._TorchCompileInductorWrapper(mode, own, None)
        settings: Any = importlib.import_module("torch._inductor.config")
        replayed = inductor.config.get("triton.cudagraphs", settings.triton.cudagraphs)
        _log(fuse(gm, example_inputs, replayed))
        return inductor(gm, example_inputs)
    if not (isinstance(inner, str) or callable(inner)):
        raise TypeError(f"options['backend'] must be the name of a compiler or a function, not {inner!r}")
    from torch._dynamo.backends.registry import lookup_backend

    compiler = lookup_backend(cast(Any, inner))
    _log(fuse(gm, example_inputs))
    return compiler(gm, example_inputs, **({"mode": mode} if mode else {}), **({"options": own} if own else {}))


def _reset() -> None:
    """What `torch._dynamo.reset` asks of a backend: lets go of the memory of CUDA graphs, as Inductor's does."""
    if trees := sys.modules.get("torch._inductor.cudagraph_trees"):
        trees.reset_cudagraph_trees()


perceptriton.reset = _reset  # pyright: ignore[reportFunctionMemberAccess]


def _log(found: list[Found]) -> None:
    for one in found:
        log.info("%s", one)


def explain(function: Callable, *args: Any, **kwargs: Any) -> list[Found]:
    """What the backend does with each linear layer that function(*args, **kwargs) calls, and why.

    The call is made once, compiled without an inner compiler. Parts between graph breaks follow each other in the list,
    which `print(*explain(model, x), sep="\\n")` shows.
    """
    found: list[Found] = []

    def backend(gm: GraphModule, example_inputs: list) -> Callable:
        found.extend(fuse(gm, example_inputs))
        return gm.forward

    # Calls of one code share a budget of compilations, beyond which Dynamo leaves it alone for good.
    can_be_alone = "isolate_recompiles" in inspect.signature(torch.compile).parameters
    alone: dict[str, Any] = {"isolate_recompiles": True} if can_be_alone else {}
    if isinstance(function, nn.Module) and function._compiled_call_impl is not None:
        function = function._call_impl  # what `Module.compile` has compiled already
    torch.compile(function, backend=backend, **alone)(*args, **kwargs)
    return found
