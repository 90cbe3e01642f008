from pathlib import Path

import cases
import pytest
import torch

from perceptriton.kernels import ops, plan


def pytest_addoption(parser):
    parser.addoption("--deterministic", action="store_true", help="torch's deterministic mode: NaN in fresh tensors")
    parser.addoption("--cubins", metavar="DIR", type=Path, help="keep what tests/test_compile.py compiles there")


def pytest_configure(config):
    if config.getoption("--deterministic"):
        torch.use_deterministic_algorithms(True)


def _round_bfloat16(monkeypatch):
    # The interpreter cuts the low half of an fp32 off where the hardware rounds to nearest. In a layer of a few
    # elements a cut y alone moves y (1 - y) by 2 %: an allowance for that would let wrong results pass in all others.
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounding_convert(input, input_dtype, output_dtype, rounding_mode):
        if input_dtype == tl.float32 and output_dtype == tl.bfloat16:
            return torch.tensor(input).to(torch.bfloat16).view(torch.uint16).numpy()
        return convert(input, input_dtype, output_dtype, rounding_mode)

    monkeypatch.setattr(interpreter, "_convert_float", rounding_convert)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def device():
    """Where kernels run: "cuda", or "cpu" in triton's interpreter, which then rounds as the hardware does."""
    found = cases.kernel_device()
    if found is None:
        pytest.skip(cases.NO_KERNELS)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if found == "cpu":
            _round_bfloat16(monkeypatch)
        yield found


@pytest.fixture
def force(monkeypatch):
    """force(forward, backward): these plans whatever the shape, so that small layers take the paths of large ones."""

    def force(forward, backward):
        for dtype in cases.DTYPES:
            monkeypatch.setitem(ops.small_cpu_products, dtype, 1)
        monkeypatch.setattr(plan, "linear_act_fwd", lambda *shape: forward)
        monkeypatch.setattr(plan, "linear_act_bwd", lambda *shape: backward)

    return force
