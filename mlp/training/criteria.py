# SPDX-License-Identifier: Apache-2.0
"""What a criterion of torch's asks of a training loop: its loss, and targets that its options are folded into."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.records import TrainConfig
from ..as_network import Network, Refused, lie_apart
from ..chains import runs_as_written
from ..ensemble import Ensemble
from .pacing import SampleOrder

# The name of the loss, and the output activation that it is for, if it is for one.
LOSSES: dict[type, tuple[str, str | None]] = {
    nn.BCELoss: ("bce", "sigmoid"),
    nn.BCEWithLogitsLoss: ("bce_logits", "identity"),
    nn.MSELoss: ("mse", None),
    nn.CrossEntropyLoss: ("cross_entropy", "identity"),
    nn.SmoothL1Loss: ("smooth_l1", None),
    nn.HuberLoss: ("smooth_l1", None),
    nn.L1Loss: ("smooth_l1", None),
}
ELEMENTWISE = tuple(kind for kind, (loss, _) in LOSSES.items() if loss != "cross_entropy")
# Beyond these float32 has no digits for a usual difference's square, divided by twice the bound.
BOUNDS = (1e-12, 1e12)


class Means:
    """Factors of losses that are means over what samples count: for each step, 1 / the sum of its batch's counts."""

    def __init__(self, counts: Tensor, kept: Tensor) -> None:
        """counts, kept: both (E, samples) or both (1, samples): what a sample counts, and whether it is not ignored."""
        # The last row is for the places that the last batch of an epoch leaves empty.
        self.table = F.pad(torch.cat([counts, kept.to(counts)]).T, (0, 0, 0, 1))

    def of(self, order: SampleOrder, rows: Tensor, start: int, steps: int) -> tuple[Tensor, Tensor]:
        """(factors, whether torch's loss is NaN without a gradient), (steps, E or 1) each. rows: `order.rows`."""
        rows = F.pad(rows, (0, -order.samples % order.batch), value=order.samples)
        batches = rows.view(-1, order.batch)[start % order.per_epoch :][:steps]
        counts, kept = F.embedding_bag(batches, self.table, mode="sum").chunk(2, 1)
        # Where all of a batch is ignored torch divides by 0 after the gradient, and elsewhere before.
        factors = torch.where(counts == 0, torch.nan, 1 / counts)
        return torch.where(kept == 0, 0.0, factors), kept == 0


def has_class_ids(criterion: object, ensemble: Ensemble, x: Tensor, y: Tensor) -> bool:
    """Whether y has a class for each sample, (samples,) or for each member's, (E, samples), and not (samples, O)."""
    if y.is_floating_point() or x.dim() < 2 or isinstance(criterion, ELEMENTWISE):
        return False
    own, targets = (len(ensemble), x.shape[-2]), (x.shape[-2], ensemble.sizes[-1])
    certain = isinstance(criterion, nn.CrossEntropyLoss | nn.NLLLoss) or own != targets
    return y.dim() == 1 or (y.shape == own and certain)


def has_own_targets(criterion: object, ensemble: Ensemble, x: Tensor, y: Tensor) -> bool:
    """Whether the first dimension of y counts members."""
    return y.dim() == 3 or (y.dim() == 2 and has_class_ids(criterion, ensemble, x, y))


def loss_fields(criterion: Any, network: Network) -> dict[str, Any]:
    """Fields of TrainConfig. Raises Refused where the criterion cannot be written out."""
    kind = type(criterion)
    if kind not in LOSSES:
        raise Refused(f"the criterion is a {kind.__name__}")
    if not runs_as_written(criterion):
        raise Refused("the criterion has hooks or a forward of its own")
    if criterion.reduction not in ("mean", "sum"):
        raise Refused(f"the criterion's reduction is {criterion.reduction!r}")
    loss, wanted = LOSSES[kind]
    if network.output != (wanted or network.output):
        raise Refused(f"{kind.__name__} on an output activation of {network.output}, not {wanted}")
    fields = {"loss": loss, "reduction": str(criterion.reduction)}
    if loss == "smooth_l1":
        # HuberLoss is SmoothL1Loss times its bound, and L1Loss has none.
        bound = {nn.SmoothL1Loss: "beta", nn.HuberLoss: "delta"}.get(kind)
        beta = float(getattr(criterion, bound)) if bound else 0.0
        if not (BOUNDS[0] <= beta <= BOUNDS[1] or (beta == 0 and kind is not nn.HuberLoss)):
            raise Refused(f"{kind.__name__} has a {bound} of {beta}")
        fields |= {"beta": beta, "factor": beta if kind is nn.HuberLoss else 1.0}
    if not 0 <= getattr(criterion, "label_smoothing", 0) <= 1:
        raise Refused(f"the criterion's label_smoothing is {criterion.label_smoothing}")
    p = network.parameters[0]
    for name, weight in _weights(criterion).items():
        plain = type(weight) is Tensor and weight.layout is torch.strided and not weight.requires_grad
        if not plain or (weight.dtype, weight.device) != (p.dtype, p.device):
            raise Refused(f"the criterion's {name} is no plain tensor of {p.dtype} on {p.device}")
        if not all(lie_apart(weight, p) for p in network.parameters):
            raise Refused(f"the criterion's {name} shares memory with a parameter")
        if not bool(weight.isfinite().all()):
            raise Refused(f"the criterion's {name} is not finite")
        if loss == "cross_entropy" and weight.shape != network.widths[-1:]:
            raise Refused(f"the criterion's {name} is {tuple(weight.shape)}, not {network.widths[-1:]}")
    return fields


MOST_BYTES = 1 << 30  # of targets that a loop without autograd needs in the place of class ids


def probabilities(criterion: nn.CrossEntropyLoss, ids: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """(.., samples, classes), 1 for the class of each sample that is not ignored.

    Raises Refused where the ordinary loop has to say what becomes of the ids.
    """
    if ids.dtype != torch.int64:
        raise Refused(f"class ids are {ids.dtype}")
    if (size := ids.numel() * classes * dtype.itemsize) > MOST_BYTES:
        raise Refused(f"class ids would become probabilities of {size / 2**30:.1f} GiB")
    kept, known = _kept(criterion, ids)
    least, greatest = (extreme.item() for extreme in known.aminmax())
    if least < 0 or greatest >= classes:
        raise Refused(f"class ids lie in [{least}, {greatest}], not in [0, {classes - 1}]")
    return torch.zeros(*ids.shape, classes, dtype=dtype, device=ids.device).scatter_(
        -1, known[..., None], kept[..., None].to(dtype)
    )


def folded(
    criterion: Any,
    config: TrainConfig,
    y: Tensor,
    ids: Tensor | None,
    sample_weight: Tensor | None,
    batch_size: int | None,
) -> tuple[TrainConfig, Tensor, Means | None]:
    """The config, targets and means with all options of the criterion in them. Raises Refused where they cannot be.

    y: (samples, O) or (E, samples, O), what `probabilities` makes of ids where there are any. sample_weight: (samples,)
    or (E, samples). batch_size: None for all.
    """
    weights, mean = _weights(criterion), config.reduction == "mean"
    sample_weight = _tempered(sample_weight) if sample_weight is not None and mean else sample_weight
    counts: Tensor | None = None  # what a sample counts in a mean, None: all alike
    kept = torch.ones(y.shape[:-1], dtype=torch.bool, device=y.device)  # and not ignored
    if config.loss != "cross_entropy":
        config, y = _weighted(config, y, weights, batch_size) if weights else (config, y)
    else:
        weight, smoothing = weights.get("weight"), criterion.label_smoothing
        weight = _tempered(weight) if weight is not None and ids is not None and mean else weight
        if ids is None and criterion.ignore_index >= 0:
            raise Refused("the criterion ignores a class of targets that are none")
        # The cross entropy is linear in its targets.
        y = y * (1 - smoothing) + smoothing / config.widths[-1] if smoothing else y
        y = y if weight is None else y * weight
        if ids is not None:
            kept, known = _kept(criterion, ids)
            y = y * kept[..., None] if smoothing else y
            if weight is not None or not bool(kept.all()):
                counts = kept.double() if weight is None else weight.double()[known] * kept
    if sample_weight is not None:
        config, y = _by_sample(config, y, sample_weight)
        counts = sample_weight.double() * (1 if counts is None else counts)
        kept = kept & (sample_weight != 0)
    if not mean or counts is None:
        return config, y, None
    counts = counts * (1 if config.loss == "cross_entropy" else config.widths[-1])
    if batch_size is not None:
        both = torch.broadcast_tensors(torch.atleast_2d(counts), torch.atleast_2d(kept))
        return replace(config, reduction="given"), y, Means(*both)
    if not bool(kept.any(-1).all()):
        raise Refused("all samples are ignored")
    scale = 1 / counts.sum(-1)[..., None, None]
    return replace(config, reduction="sum"), (y * _of_weights(config, scale)).to(y.dtype), None


def _tempered(weights: Tensor) -> Tensor:
    """Weights that a mean divides by the sum of: far ones are divided by a power of two, so that float32 has both.

    The greatest is then in [1, 2).
    """
    greatest = weights.double().amax(-1, keepdim=True)
    far = (greatest > 0) & ((greatest < 1e-20) | (greatest > 1e20))
    power = greatest / (2 * torch.frexp(greatest).mantissa)
    return (weights / torch.where(far, power, 1.0)).to(weights.dtype)


def _by_sample(config: TrainConfig, y: Tensor, sample_weight: Tensor) -> tuple[TrainConfig, Tensor]:
    """The config and targets whose losses are multiplied by the weight of their sample."""
    if config.loss != "cross_entropy" and not config.weighted:
        config, y = replace(config, weighted=True), torch.cat([y, torch.ones_like(y)], -1)
    return config, (y * _of_weights(config, sample_weight.double()[..., None])).to(y.dtype)


def _of_weights(config: TrainConfig, factor: Tensor) -> Tensor:
    """What multiplies columns of y so that each loss is multiplied by the factor, (.., samples or 1, 1)."""
    if not config.weighted:
        return factor
    outputs = config.widths[-1]
    return torch.cat(
        [torch.ones_like(factor).expand(*factor.shape[:-1], outputs), factor.expand(*factor.shape[:-1], outputs)], -1
    )


def _weights(criterion: Any) -> dict[str, Tensor]:
    found = {name: getattr(criterion, name, None) for name in ("weight", "pos_weight")}
    return {name: weight for name, weight in found.items() if weight is not None}


def _kept(criterion: nn.CrossEntropyLoss, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(whether each sample is not ignored, its class, 0 for one that is)."""
    kept = ids != criterion.ignore_index
    return kept, ids * kept


def _weighted(
    config: TrainConfig, y: Tensor, weights: dict[str, Tensor], batch_size: int | None
) -> tuple[TrainConfig, Tensor]:
    """The targets, and behind them a weight for each."""
    for name, weight in weights.items():
        fits = zip(reversed(weight.shape), reversed(y.shape[-2:]), strict=False)
        if weight.dim() > 2 or any(size not in (1, whole) for size, whole in fits):
            raise Refused(f"the criterion's {name} {tuple(weight.shape)} does not broadcast to {tuple(y.shape[-2:])}")
        if batch_size is not None and weight.dim() == 2 and len(weight) > 1:
            raise Refused(f"the criterion's {name} {tuple(weight.shape)} tells the places of a minibatch apart")
    weight = weights.get("weight", y.new_ones(())).double()
    target = y.double()
    if "pos_weight" in weights:
        positive = weights["pos_weight"].double()
        if bool((positive < 0).any()) or bool(((y < 0) | (y > 1)).any()):
            raise Refused("y lies outside of [0, 1], or the criterion's pos_weight is negative")
        # The loss is a softplus(-z) + b softplus(z), and that is a + b times the loss of the target a / (a + b).
        a, b = positive * target, 1 - target
        target = torch.where(a + b == 0, 0.0, a / (a + b))
        weight = weight * (a + b)
    return replace(config, weighted=True), torch.cat([target, weight.expand_as(target)], -1).to(y.dtype)
