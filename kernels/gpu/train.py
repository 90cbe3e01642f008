# SPDX-License-Identifier: Apache-2.0
"""Whole training loops in one launch, or one per step: a small MLP's training, for one network or for many.

A network has layers l = 0 .. L-1 from K_l = widths[l] to N_l = widths[l + 1] features, h_0 = x:

    z_l = h_l @ weight_l.T + bias_l,  h_{l+1} = act_l(z_l),  y = h_L,  loss = sum or mean of loss(z_{L-1}, y, target)

Three kernels, of one signature but for their tiles:

- lane: one network per lane of a warp. Parameters, gradients and optimizer state are tuples of [BLOCK] tensors, one
  element per network, that never leave the registers; a batch is unrolled, ROWS samples at a time.
- block: one network per program. Weights are [N, K] tiles, padded to powers of two of at least 16; a batch goes
  through them in tiles of BLOCK_M samples. Activations are transposed, [width, samples], so that a sum over samples
  has the gradient of z as its left operand as it is.
- spread: the same for one step, and for batches that are too large for one multiprocessor. Each program writes its part
  of the gradient into a slot; the last one to arrive adds the slots up, in their order, and takes the step.

Lane and block walk segments of steps. A segment begins with a step whose loss is logged: the loss is computed from a
forward pass of its own, so that the loop over steps has no store in it. What a step does depends on its number alone,
never on where a launch began: cutting a run into launches changes no bit of it. Integers are not specialized for the
same reason, and because each specialization would be compiled anew.

Padding (block and spread): a padded neuron of a sigmoid layer would put out 0.5, and the weights that read it would
learn. Outputs of padded neurons are set to 0, with which all padded gradients are 0. A padded bias of -1e4 would do the
same until weight decay has eaten it up.
"""

# pyright: reportCallIssue=false, reportArgumentType=false
# Launch options are not in triton's types.
import itertools
import math

import torch
import triton
from torch import Tensor

from ..hyperparameters import COMMON, Hyperparameters, loss_scale
from .functions import ACTIVATIONS
from .launch import device_of, launch_in_a_row
from .network import padded
from .train_block import train_block_kernel
from .train_lane import train_lane_kernel
from .train_rules import LOSSES, OPTIMIZERS
from .train_spread import train_spread_kernel

# Numbers of slots that a thread may have on their way, at a register each.
FLYING = 96


class KernelLoop:
    """A run of training steps in launches. The arguments are those of `TorchLoop`, in float32 and contiguous."""

    def __init__(
        self, config, parameters, first, second, lr, x, y, batch_size, taken, plan, own: Hyperparameters = COMMON
    ) -> None:
        self.taken, self.plan = taken, plan
        widths, members, self.samples = config.widths, parameters[0].shape[0], x.shape[1]
        batch_size = min(batch_size, self.samples)
        self.batches = -(-self.samples // batch_size)
        last = self.samples - (self.batches - 1) * batch_size
        loss = "l1" if config.loss == "smooth_l1" and not config.beta else config.loss
        self.factor = config.factor
        if config.optimizer in ("adam", "adamw"):
            optimizer, betas = "adam", (own.of(config, "beta1"), own.of(config, "beta2"))
            hyper = (betas[0], 1 - betas[0], betas[1], 1 - betas[1], *map(_log, betas), config.eps)
        elif config.optimizer == "rmsprop":
            optimizer, alpha = "rmsprop_momentum" if config.momentum else "rmsprop", own.of(config, "beta2")
            hyper = (alpha, 1 - alpha, config.eps, own.of(config, "momentum"))
        else:
            optimizer = "sgd" if config.momentum == 0 else "nesterov" if config.nesterov else "momentum"
            hyper = (own.of(config, "momentum"), own.undamped(config))
        sizes = tuple(p[0].numel() for p in parameters)
        if plan.impl == "lane":
            self.kernel, self.grid = train_lane_kernel, (triton.cdiv(members, plan.networks),)
            starts = tuple(itertools.accumulate(sizes, initial=0))[:-1]
            at = starts[:: len(parameters) // (len(widths) - 1)]
            tile = {"STARTS": starts, "AT": at, "BLOCK": plan.networks}
        else:
            self.kernel, self.grid = train_block_kernel, (members,)
            tile = {"PADDED": padded(widths), "BLOCK_M": plan.rows}
        self.spread = plan.programs > 1
        if self.spread:
            self.kernel, self.grid = train_spread_kernel, (plan.programs, members)
            layers = itertools.pairwise(padded(widths))
            counts = [count for k, n in layers for count in ((n * k, n) if config.bias else (n * k,))]
            starts = tuple(itertools.accumulate(counts, initial=0))
            slot = starts[-1] + 16  # a multiple of 16, with room for the loss
            unroll = next((u for u in (16, 8, 4, 2) if u * slot <= FLYING * 32 * plan.num_warps), 1)
            self.progress = torch.zeros(members, 2, dtype=torch.int32, device=x.device)
            slots = torch.empty(members, plan.programs, slot, dtype=torch.float32, device=x.device)
            tile |= {"slots_ptr": slots, "progress_ptr": self.progress}
            tile |= {"STARTS": starts, "SLOT": slot, "UNROLL": unroll}
        # The arguments that are the same in every launch.
        self.arguments = {
            "parameter_ptrs": tuple(parameters),
            "first_ptrs": tuple(first) or None,
            "second_ptrs": tuple(second) or None,
            "lr_ptr": lr,
            "factors_ptr": None,
            "x_ptr": x,
            "y_ptr": y,
            "members": members,
            "samples": self.samples,
            "stride_xe": x.stride(0) if x.shape[0] > 1 else 0,
            "stride_ye": y.stride(0) if y.shape[0] > 1 else 0,
            "stride_ls": None,
            "stride_le": None,
            "stride_fs": None,
            "stride_fe": None,
            "batch_size": batch_size,
            "batches": self.batches,
            "scale": loss_scale(config, batch_size),
            "last_scale": loss_scale(config, last),
            "beta": config.beta if loss == "smooth_l1" else None,
            "weight_decay": _single(own.of(config, "weight_decay"), x.device) if config.weight_decay else None,
            "hyper": tuple(_single(number, x.device) for number in hyper),
            "HIDDEN": ACTIVATIONS[config.hidden][0],
            "HIDDEN_BACKWARD": ACTIVATIONS[config.hidden][1],
            "OUTPUT": ACTIVATIONS[config.output][0],
            "OUTPUT_BACKWARD": ACTIVATIONS[config.output][1],
            "SUMS": LOSSES[loss][0],
            "LOSS": LOSSES[loss][1],
            "DZ": LOSSES[loss][2],
            "NUMBERS": OPTIMIZERS[optimizer][0],
            "UPDATE": OPTIMIZERS[optimizer][1],
            "DECOUPLED": config.optimizer == "adamw",
            "WIDTHS": widths,
            "TARGETS": y.shape[-1],
            "SIZES": sizes,
            **tile,
            "num_warps": plan.num_warps,
            "num_stages": 1,
            # Without a limit of its own the assembler spills a few values in order to stay at 64, 96 or 128 registers.
            "maxnreg": 255,
        }

    def run(
        self,
        order: Tensor | None,
        start: int,
        steps: int,
        log_every: int,
        losses: Tensor,
        rates: Tensor | None = None,
        factors: Tensor | None = None,
    ) -> None:
        """As `TorchLoop.run`; order is int32, all else float32."""
        if steps == 0:
            return
        # Without a log there is one segment, which began a step before the launch, so that no loss is due. The kernel
        # is the one that logs, and results have the same bits.
        offset = start % log_every if log_every else 1
        arguments = self.arguments | {
            "order_ptr": order,
            "losses_ptr": losses,
            "batch": start % self.batches,
            "taken": self.taken,
            "offset": offset,
            # The kernel adds the period to step numbers, and one longer than the launch could overflow.
            "period": min(log_every or offset + steps, offset + steps),
        }
        factors = None if factors is None else factors * self.factor
        for name, letter, numbers in (("lr_ptr", "l", rates), ("factors_ptr", "f", factors)):
            if numbers is not None:
                # Rows of a longer tensor may begin anywhere in memory, a copy at a multiple of 16 bytes.
                arguments[name] = numbers.clone(memory_format=torch.contiguous_format)
                strides = {f"stride_{letter}s": numbers.shape[1], f"stride_{letter}e": int(numbers.shape[1] > 1)}
                arguments |= strides
        with device_of(losses.device):
            if self.spread:
                self.progress.zero_()
                launch_in_a_row(self.kernel, self.grid, steps, **arguments, enable_fp_fusion=True)
            else:
                resident = order is None and self.batches == 1 and self.samples <= self.plan.rows
                rows = {"ROWS": self.samples if resident else self.plan.rows} if self.plan.impl == "lane" else {}
                self.kernel[self.grid](**arguments, steps=steps, RESIDENT=resident, **rows, enable_fp_fusion=True)
        self.taken += steps


def _log(beta: float | Tensor) -> float | Tensor:
    """In fp64, with -inf for 0."""
    return beta.log() if isinstance(beta, Tensor) else math.log(beta) if beta else -math.inf


def _single(number: float | Tensor, device: torch.device) -> float | Tensor:
    """As a kernel takes it."""
    return number.to(device, torch.float32) if isinstance(number, Tensor) else number
