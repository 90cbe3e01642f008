# SPDX-License-Identifier: Apache-2.0
"""Models of ours under DDP, FSDP2 and tensor parallelism: two processes train as one process trains the nn model."""

import functools

import pytest
import torch
from cases import relative_error
from training_cases import relative, two_ranks

if not torch.distributed.is_available():
    pytest.skip("torch is built without distributed", allow_module_level=True)

import gloo_composition
import gloo_sweep
from gloo_composition import DATA_PARALLEL, MODELS, SIZES, TENSOR_PARALLEL


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two processes has found, by case, model and size, and in its sweeps."""
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


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:an ordinary loop trains this Ensemble")
def test_two_processes_sweep_as_one(ranks):
    alone = [
        gloo_sweep.sweep(**own) for own in ({}, {"members": 1, "dtype": torch.float64}, {"members": 1, "mixed": True})
    ]
    for rank, (*results, spoiled, broken) in enumerate(found["sweeps"] for found in ranks):
        # Of what only the second rank would train: the first must not wait for it.
        assert spoiled.startswith("ValueError: y must lie in [0, 1] for BCELoss, not in [0.01251")
        other = "RuntimeError: rank 1 of 2 could not train its share"
        assert broken == ("ArithmeticError: not on this rank" if rank else other)
        # One member is less than two processes: the second one is idle then.
        for found, expected in zip(results, alone, strict=True):
            assert found["steps"] == expected["steps"] == [0, 6, 12, 18, 24]
            assert found["best"][:1] == expected["best"][:1]
            assert torch.equal(found["random"], expected["random"])
            assert relative(found["parameters"], expected["parameters"]) < 1e-5
            assert relative([found["loss"]], [expected["loss"]]) < 1e-5
            assert found["loss"].dtype is expected["loss"].dtype
    # Each process drew its own; without rank 0's, the second would have ended elsewhere.
    other = gloo_sweep.sweep(seed=4)
    assert relative(other["parameters"], alone[0]["parameters"]) > 1e-2


@pytest.mark.slow
def test_a_share_may_take_longer_than_its_group_waits(ranks):
    (loss, seconds), (other, _) = (found["late"] for found in ranks)
    assert seconds > 2 * 6 * 0.3
    assert loss.shape == (6, 3)
    assert loss.isfinite().all()
    assert torch.equal(loss, other)


@pytest.mark.slow
def test_two_processes_stop_as_one(ranks):
    alone = [gloo_sweep.watched(), gloo_sweep.watched(cut=4), gloo_sweep.watched(members=1)]
    stopped = alone[0]["stopped"].tolist()
    assert len({*stopped}) > 1
    assert alone[0]["rate"][0] < 0.05
    # A cut run goes on to the bit, whoever trains what.
    for results in (alone, *(found["watched"] for found in ranks)):
        assert all(map(torch.equal, results[0]["parameters"], results[1]["parameters"]))
    for results in (found["watched"] for found in ranks):
        for found, expected in zip(results, alone, strict=True):
            assert torch.equal(found["stopped"], expected["stopped"])
            assert found["steps"] == expected["steps"]
            assert found["rate"] == expected["rate"]
            assert torch.equal(found["random"], expected["random"])
            for name in ("parameters", "state", "validation"):
                assert relative(found[name], expected[name]) < 1e-5
            for one, other in zip(found["loss"].t(), expected["loss"].t(), strict=True):
                there = ~other.isnan()
                assert torch.equal(one.isnan(), ~there)
                assert relative([one[there]], [other[there]]) < 1e-5
