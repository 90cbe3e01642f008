"""The cases that every op is tested with, each with its reason, and the yardstick that they are measured by."""

import torch

# (rows, in_features, out_features): why
SHAPES = {
    "xor-hidden": (4, 2, 2),
    "xor-head": (4, 2, 1),  # [N, 1] heads break narrow stores
    "single": (1, 1, 1),
    "row": (1, 16, 16),
    "exact-tile": (64, 16, 32),  # no mask is ever false
    "ragged": (100, 10, 31),  # every mask is false somewhere
    "one-off": (65, 17, 33),
    "deep-k": (33, 200, 9),  # wider than the tile that keeps the weight on chip
    "wide": (70, 100, 150),
}
EMPTY_SHAPES = {
    "no-rows": (0, 3, 2),
    "no-inputs": (5, 0, 2),  # act(bias)
    "no-outputs": (5, 3, 0),
}
ACTIVATIONS = ("sigmoid", "tanh", "relu", "identity")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What a dtype's own rounding may add to twice torch's error, as a relative norm.
FLOOR = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-3, torch.float16: 4e-4}


def make_layer(m, k, n, dtype, device="cpu", seed=0):
    """x, weight, bias, dy with pre-activations of std near 1.5 and upstream gradients of order 1.

    Gradients of a default-initialized sigmoid net are so small that zeros pass most tolerances.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight, bias, dy = normal(m, k), 1.4 * normal(n, k) / max(k, 1) ** 0.5, 0.5 * normal(n), normal(m, n)
    return tuple(t.to(device, dtype) for t in (x, weight, bias, dy))


def torch_layer(x, weight, bias, dy, activation, dtype=None):
    """y, dx, dweight, dbias of the same values from torch's own operations and autograd, in `dtype`."""
    x, weight, bias, dy = (t if t is None or dtype is None else t.detach().to(dtype) for t in (x, weight, bias, dy))
    inputs = [t.detach().requires_grad_() for t in (x, weight, bias) if t is not None]
    z = torch.nn.functional.linear(*inputs)
    y = z if activation == "identity" else getattr(torch, activation)(z)
    return (y.detach(), *torch.autograd.grad(y, inputs, dy))


def relative_error(actual, truth):
    """|actual - truth| / |truth| in fp64; absolute where the truth is 0."""
    actual, truth = actual.detach().double().cpu(), truth.detach().double().cpu()
    assert actual.shape == truth.shape, f"shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
    return ((actual - truth).norm() / (truth.norm() if truth.norm() > 0 else 1)).item()


def assert_as_good_as_torch(actual, torch_result, truth, dtype, names=("y", "dx", "dweight", "dbias"), allowance=0.0):
    """Each result no farther from the fp64 truth than twice torch's own in this dtype, plus the dtype's floor."""
    for name, a, t, exact in zip(names, actual, torch_result, truth, strict=True):
        error, torch_error = relative_error(a, exact), relative_error(t, exact)
        bound = 2 * torch_error + FLOOR[dtype] + allowance
        # `not <=`: a NaN must fail
        if not error <= bound:
            difference = (a.detach().double().cpu() - exact.double().cpu()).abs()
            where = tuple(torch.unravel_index(difference.nan_to_num(torch.inf).argmax(), difference.shape))
            index = tuple(int(i) for i in where)
            raise AssertionError(
                f"{name}: error {error:.2e} > {bound:.2e} (torch {torch_error:.2e}); "
                f"at {index}: {a[index].item()} instead of {exact[index].item()}"
            )
