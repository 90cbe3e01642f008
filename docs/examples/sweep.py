# SPDX-License-Identifier: Apache-2.0
"""A sweep over seeds and learning rates, shared by the processes of `torchrun`.

torchrun --standalone --nproc-per-node 2 docs/examples/sweep.py
"""

import os

import torch
import torch.distributed as dist

from perceptriton.mlp import Ensemble, fit_sharded

RATES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
SEEDS = 50


def main(steps: int = 2000) -> list[int]:
    """Trains exclusive or for every seed at every rate; returns how many seeds learn it at each rate."""
    x = torch.tensor([[0.0, 0], [0, 1], [1, 0], [1, 1]])
    y = torch.tensor([[0.0], [1], [1], [0]])
    # Network 6 s + r starts from seed s and learns at rate r.
    nets = Ensemble.from_seeds(range(SEEDS), [2, 2, 1]).repeat(len(RATES))
    history = fit_sharded(
        nets,
        x,
        y,
        criterion=torch.nn.BCELoss(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0),
        steps=steps,
        log_every=steps - 1,
        lr=torch.tensor(RATES).repeat(SEEDS),
    )
    # Below ln 2 / 4 all four answers must be right.
    solved = (history.loss[-1] < 0.1733).view(SEEDS, len(RATES)).sum(0).tolist()
    if not dist.is_initialized() or dist.get_rank() == 0:
        for rate, number in zip(RATES, solved, strict=True):
            print(f"rate {rate:5}: {number:3} of {SEEDS} seeds learn it")
        print(f"{len(nets)} networks, {history.seconds:.2f} s, path {history.path}")
    return solved


if __name__ == "__main__":
    if "RANK" in os.environ:  # torchrun has started this
        dist.init_process_group("gloo")
    try:
        main()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
