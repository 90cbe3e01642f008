"""What a training loop leaves to look at."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)  # == of two tensors is no bool
class History:
    """What `fit` returns."""

    steps: list[int]  # at which the loss was logged, counted from 0 in each call of fit
    loss: Tensor  # before the update of that step: (rows,), of an Ensemble (rows, E), on the CPU
    seconds: float  # of the whole call of fit
    path: str  # which implementation ran: "lane", "block", "graph", "native", "torch"; "general": an ordinary loop
    setup_seconds: float = 0.0  # of these: until compiled loops were compiled, or read from disk
