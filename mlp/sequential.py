# SPDX-License-Identifier: Apache-2.0
"""An `nn.Sequential` that pairs linear layers and activations when it is called, and runs those in a row as one."""

from typing import Any, ClassVar

from torch import nn
from torch._C import _get_tracing_state  # pyright: ignore[reportAttributeAccessIssue]
from torch.autograd import profiler
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

from ..kernels import eligibility
from ..kernels.eligibility import PLAIN
from .chains import CALL, CALL_IMPL, Chain, chains, own_method
from .functional.eager import product_dtype
from .layers import NAMES

_FORWARD = own_method(nn.Sequential)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

# Attributes of modules in a chain that torch.compile is to guard.
_GUARDED = ("forward", "weight", "bias", *_HOOKS)


class FusedSequential(nn.Sequential):
    """An `nn.Sequential` whose forward runs linear layers and activations that follow each other as one network.

    Its modules stay what they are, and what it computes is what calling them in turn computes: at every call they are
    looked at anew, and those with hooks, parametrizations or a `forward` of their own are called one by one.
    """

    # Nothing here has a name that a subclass, an attribute or a child of somebody's may have.
    _fused_from: ClassVar[type[nn.Sequential]] = nn.Sequential  # the class that `fuse_` takes this one for
    # The modules, those that are in no chain, the classes of these, the steps, the one that is all a call runs, and the
    # class of the Sequential; see `steps_of`.
    _fused_plan: tuple[tuple, list[nn.Module], list[type], list[Chain | nn.Module], Chain | None, type] | None = None

    def __init_subclass__(cls, **options) -> None:
        # The class that `fuse_` makes of another is none that a registry of its subclasses should hear of.
        if "_fused_from" not in cls.__dict__:
            super().__init_subclass__(**options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the call of any module does, written out where it runs one chain: frames are what a tiny one costs."""
        if is_dynamo_compiling():
            return super().__call__(*args, **kwargs)
        own = self.__dict__
        if (
            (planned := own.get("_fused_plan")) is None
            or (chain := planned[4]) is None
            or planned[0] != tuple(own["_modules"].values())
            or len(args) != 1
            or kwargs
            or type(input := args[0]) not in PLAIN
            or (kind := type(self)) is not planned[5]
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or own["_backward_hooks"]
            or own["_backward_pre_hooks"]
            or "forward" in own
            or "_call_impl" in own
            or "_compiled_call_impl" in own
            or _global_forward_hooks
            or _global_forward_pre_hooks
            or _global_backward_hooks
            or _global_backward_pre_hooks
            # Somebody may have patched a class, or have made one whose methods are others.
            or kind.forward is not _FUSED_FORWARD
            or kind._call_impl is not CALL_IMPL
            or (before := kind._fused_from).__call__ is not CALL
            or before.forward is not _FORWARD
            or _get_tracing_state() is not None
            or profiler._is_profiler_enabled
        ):
            return super().__call__(*args, **kwargs)
        return chain.run_plain(input)

    def forward(self, input):  # without types, as torch's own, which torch.fx would write into its code
        """input (..., in_features of the first layer) -> (..., out_features of the last)."""
        if is_compiling():
            if not eligibility.launchable(input.device, product_dtype(input)[0]):
                return super().forward(input)
            for module in self._modules.values():
                # The compiler guards attributes that are asked for, as it does not what `is_plain` looks for. Others
                # than these classes may compute theirs.
                for name in _GUARDED if type(module) in NAMES else ():
                    getattr(module, name, None)
            for step in chains(self._modules.values(), seen=True):
                input = step.fused(input) if isinstance(step, Chain) else step(input)
            return input
        if _get_tracing_state() is not None:
            return super().forward(input)  # torch.jit records calls of modules
        if self._fused_from.forward is not _FORWARD:
            return super().forward(input)  # patched since
        for step in steps_of(self):
            input = step(input)
        return input

    def __prepare_scriptable__(self) -> nn.Sequential:
        # What torch.jit.script compiles, which puts what it makes of the modules into the dict that it finds.
        plain = object.__new__(self._fused_from)
        plain.__dict__.update(self.__dict__, _modules=dict(self._modules))
        plain.__dict__.pop("_fused_plan", None)
        return plain

    def __getstate__(self):
        state = super().__getstate__()  # of a subclass, anything
        return {name: state[name] for name in state if name != "_fused_plan"} if isinstance(state, dict) else state


_FUSED_FORWARD = FusedSequential.forward


def _goes_on(module: FusedSequential) -> bool:
    """Whether `super().__call__` is that of the class it was fused from, and attributes are where modules have them."""
    kind = type(module)
    behind = kind.__mro__[kind.__mro__.index(FusedSequential) + 1 :]
    return (
        behind == kind._fused_from.__mro__
        and kind.__getattribute__ is object.__getattribute__
        and kind._compiled_call_impl is None
        and all([name in module.__dict__ for name in _HOOKS])
    )


def steps_of(module: FusedSequential) -> list[Chain | nn.Module]:
    """What runs in the place of the modules, planned anew when one has come, gone or changed its class."""
    planned, modules = module._fused_plan, tuple(module._modules.values())
    # A chain looks at the classes of its modules itself.
    if (
        planned is None
        or planned[0] != modules
        or list(map(type, planned[1])) != planned[2]
        or planned[5] is not type(module)
    ):
        steps = chains(modules)
        alone = [step for step in steps if not isinstance(step, Chain)]
        only = steps[0] if len(steps) == 1 and not alone and _goes_on(module) else None
        planned = modules, alone, list(map(type, alone)), steps, only, type(module)
        # A module with an equality of its own may equal the one that replaces it.
        if all(type(step).__eq__ is object.__eq__ for step in alone):
            module.__dict__["_fused_plan"] = planned
    return planned[3]
