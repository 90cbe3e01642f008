"""Models of ours under DDP, FSDP2 and tensor parallelism: two processes train as one process trains the nn model."""

import functools

import pytest
import torch
from cases import relative_error
from training_cases import two_ranks

if not torch.distributed.is_available():
    pytest.skip("torch is built without distributed", allow_module_level=True)

import gloo_composition
from gloo_composition import DATA_PARALLEL, MODELS, SIZES, TENSOR_PARALLEL


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes has found, by case, model and size."""
    return two_ranks(gloo_composition.__file__, tmp_path_factory.mktemp("gloo"))


@functools.cache
def alone(size):
    """One process, the whole batch, nn.Linear and nn.Sigmoid."""
    return gloo_composition.train(gloo_composition.sequential(size), size)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", [*DATA_PARALLEL, *TENSOR_PARALLEL])
def test_two_processes_train_as_one(case, name, size, ranks):
    y, *parameters = alone(size)
    start = list(gloo_composition.sequential(size).parameters())
    bound = 2e-2 if case == "fsdp-bf16" else 1e-5
    for found in ranks:
        y_found, *parameters_found = found[case, name, size]
        assert relative_error(y_found, y) < bound
        # What three steps have changed, so that parameters that never moved do not pass.
        for p_found, p, p_start in zip(parameters_found, parameters, start, strict=True):
            assert relative_error(p_found - p_start, p - p_start) < 5 * bound
