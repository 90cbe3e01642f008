# SPDX-License-Identifier: Apache-2.0
"""The scikit-learn estimators: scikit-learn's own checks, and that they are `MLP` and `fit` and nothing else."""

import copy
import fractions
import functools
import importlib
import sys

import numpy as np
import pytest
import torch
from torch import nn
from training_cases import needs_numba

from perceptriton.mlp import Ensemble, fit

pytest.importorskip("sklearn", minversion="1.6", reason="scikit-learn is not installed")

from sklearn.datasets import load_digits, make_regression
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler
from sklearn.utils import estimator_checks
from sklearn.utils.estimator_checks import parametrize_with_checks

from perceptriton.mlp.estimator import FusedMLPClassifier, FusedMLPRegressor, base


def expected_failed_checks(estimator):
    reason = "predictions are float32, in which they are computed; the check wants float64"
    return {"check_regressor_multioutput": reason} if isinstance(estimator, FusedMLPRegressor) else {}


@pytest.mark.slow
@parametrize_with_checks([FusedMLPClassifier(), FusedMLPRegressor()], expected_failed_checks=expected_failed_checks)
def test_rules_of_scikit_learn(estimator, check, monkeypatch):
    # The checks' own tolerances are those of float64. Which place a sample has in a product decides the order of its
    # sums on some CPUs, in predictions up to 3; weights and repeated samples round differently in each step.
    rounding = {
        estimator_checks.check_methods_sample_order_invariance: 1e-6,
        estimator_checks.check_sample_weight_equivalence_on_dense_data: 1e-4,
        estimator_checks.check_sample_weight_equivalence_on_sparse_data: 1e-4,
    }
    if bound := rounding.get(check.func):
        compare = estimator_checks.assert_allclose_dense_sparse
        monkeypatch.setattr(
            estimator_checks,
            "assert_allclose_dense_sparse",
            lambda x, y, atol=0, err_msg="": compare(x, y, rtol=bound, atol=bound, err_msg=err_msg),
        )
    check(estimator)


# --- MLP and fit, no more ----------------------------------------------------------------------------------

SOLVERS = {
    "sgd": ({"momentum": 0.5}, lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.5, weight_decay=1e-3)),
    "adam": ({}, lambda p: torch.optim.Adam(p, lr=0.02, weight_decay=1e-3)),
    "adamw": ({}, lambda p: torch.optim.AdamW(p, lr=0.02, weight_decay=1e-3)),
}


@pytest.mark.parametrize("batch_size", [None, 16], ids=["full-batch", "ragged-batches"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_is_fit(solver, batch_size):
    options, optimizer = SOLVERS[solver]
    x, y = torch.randn(40, 3), torch.randn(40, 2)
    options = options | {"solver": solver, "learning_rate": 0.02, "weight_decay": 1e-3, "batch_size": batch_size}
    estimator = FusedMLPRegressor(
        [5, 4], activation="tanh", max_iter=4, n_iter_no_change=None, random_state=7, **options
    )
    estimator.fit(x.numpy(), y.numpy())

    seed = np.random.RandomState(7).randint(np.iinfo(np.int32).max)
    generator = torch.Generator().manual_seed(int(seed))
    model = Ensemble(1, [3, 5, 4, 2], "tanh", "identity", generator=generator).member(0)
    before = [p.clone() for p in model.parameters()]
    options = {"steps": 4 if batch_size is None else 12, "batch_size": batch_size, "generator": generator}
    own = optimizer(model.parameters())
    history = fit(model, x, y, criterion=nn.MSELoss(), optimizer=own, log_every=1, **options)
    for own, by_hand, old in zip(estimator.model_.parameters(), model.parameters(), before, strict=True):
        assert torch.equal(own, by_hand)
        assert not torch.equal(own, old)
    shares = torch.tensor([1.0] if batch_size is None else [0.4, 0.4, 0.2])
    assert estimator.loss_curve_ == pytest.approx((history.loss.view(4, -1) @ shares).tolist(), rel=1e-6)
    assert (estimator.n_iter_, estimator.loss_) == (4, estimator.loss_curve_[-1])
    assert np.array_equal(estimator.predict(x.numpy()), model(x).detach().numpy())


def test_random_numbers_of_others_are_left_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    FusedMLPClassifier(max_iter=1, random_state=0).fit([[0.0], [1.0]], [0, 1])
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


# --- classes -----------------------------------------------------------------------------------------------


def blobs(classes):
    """(60, 2) points around as many corners of a square, and their classes."""
    y = np.arange(60) % classes
    corners = np.array([[-2, -2], [2, 2], [-2, 2]])
    return corners[y] + 0.3 * np.random.RandomState(0).randn(60, 2), y


def logits(estimator, x):
    return estimator.model_(torch.tensor(x, dtype=torch.float32)).detach()


def test_two_classes_have_one_output():
    x, y = blobs(2)
    names = np.array(["no", "yes"])
    estimator = FusedMLPClassifier((4,), random_state=0).fit(x, names[y])
    assert estimator.classes_.tolist() == ["no", "yes"]
    (p,) = logits(estimator, x).sigmoid().T.numpy()
    np.testing.assert_allclose(estimator.predict_proba(x), np.stack([1 - p, p], 1), rtol=1e-5, atol=1e-7)
    assert estimator.predict(x).tolist() == names[y].tolist()
    assert estimator.score(x, names[y]) == 1


def test_more_classes_are_a_softmax():
    x, y = blobs(3)
    estimator = FusedMLPClassifier((), random_state=0).fit(x, 10 * y)
    outputs = logits(estimator, x)
    assert outputs.shape == (60, 3)
    np.testing.assert_allclose(estimator.predict_proba(x), outputs.softmax(1).numpy(), rtol=1e-5)
    assert estimator.predict(x).tolist() == (10 * y).tolist()


@pytest.mark.parametrize("classes", [2, 3])
def test_logarithms_do_not_underflow(classes):
    x, y = blobs(classes)
    estimator = FusedMLPClassifier((), random_state=0).fit(x, y)
    with torch.no_grad():
        estimator.model_[0].weight.mul_(1e3)
    logs = estimator.predict_log_proba(x)
    assert logs.min() < -1000
    assert np.isfinite(logs).all()
    np.testing.assert_allclose(np.exp(logs), estimator.predict_proba(x))


def test_several_labels_are_not_divided():
    x = np.random.RandomState(0).randn(200, 3).astype("float32")
    y = (x > [-1, 0, 0.5]).astype(int)
    estimator = FusedMLPClassifier((), random_state=0).fit(x, y)
    p = estimator.predict_proba(x)
    np.testing.assert_allclose(p, logits(estimator, x).sigmoid().numpy(), rtol=1e-5)
    assert np.array_equal(estimator.predict(x), p > 0.5)
    assert (estimator.predict(x) == y).mean() > 0.95


# --- what scikit-learn's own MLP has -----------------------------------------------------------------------


def parameters(estimator):
    return torch.cat([p.detach().flatten() for p in estimator.model_.parameters()])


@pytest.mark.parametrize("kind", ["regressor", "two", "three", "labels"])
def test_weights_count_samples(kind):
    """A weight of 0 is a sample that is not there, and one of 2 is a sample that is there twice."""
    x, y = blobs(3 if kind == "three" else 2)
    y = {"regressor": x[:, 0] * y, "labels": np.stack([y, x[:, 1] > 0], 1).astype(int)}.get(kind, y)
    weights = np.random.RandomState(1).randint(0, 3, 60)
    make = FusedMLPRegressor if kind == "regressor" else FusedMLPClassifier
    options = {"batch_size": None, "max_iter": 30, "random_state": 0, "n_iter_no_change": None}
    weighted = make((4,), **options).fit(x, y, sample_weight=weights)
    repeated = make((4,), **options).fit(np.repeat(x, weights, 0), np.repeat(y, weights, 0))
    assert (parameters(weighted) - parameters(repeated)).abs().max() < 1e-4
    without = make((4,), **{**options, "batch_size": 7}).fit(x[weights > 0], y[weights > 0], weights[weights > 0])
    assert torch.equal(parameters(make((4,), **{**options, "batch_size": 7}).fit(x, y, weights)), parameters(without))
    assert np.isfinite(make((4,), **{**options, "batch_size": 1}).fit(x, y, weights).loss_curve_).all()
    with pytest.raises(
        ValueError, match=r"^([Ss]ample.weights? (is 0 for all samples|must contain at least one non-zero))"
    ):
        make((4,), **options).fit(x, y, sample_weight=0 * weights)
    assert (parameters(weighted) - parameters(make((4,), **options).fit(x, y))).abs().max() > 1e-3
    # A batch is the mean by its weights, so a factor of all changes nothing.
    options["batch_size"] = 16
    one, other = (make((4,), **options).fit(x, y, sample_weight=f * (1 + weights)) for f in (1.0, 4.0))
    assert (parameters(one) - parameters(other)).abs().max() < 1e-5
    with pytest.raises(ValueError, match=r"[Ss]ample_weight"):
        make((4,), **options).fit(x, y, sample_weight=weights[:5])


@pytest.mark.parametrize("form", ["csr_matrix", "csc_array", "coo_matrix"])
def test_sparse_samples(form):
    import scipy.sparse

    x, y = blobs(3)
    x = np.where(abs(x) < 2, 0, x)
    sparse = getattr(scipy.sparse, form)(x)
    own, other = (FusedMLPClassifier((4,), max_iter=5, random_state=0).fit(given, y) for given in (sparse, x))
    assert torch.equal(parameters(own), parameters(other))
    assert np.array_equal(own.predict_proba(sparse), other.predict_proba(x))


@pytest.mark.parametrize("solver", ["sgd", "adam"])
def test_partial_fit_goes_on(solver):
    """Epoch by epoch, with the state of the optimizer, as one fit of as many epochs."""
    x, y = blobs(3)
    options = {"solver": solver, "max_iter": 4, "n_iter_no_change": None, "random_state": 0, "batch_size": 16}
    whole, parts = FusedMLPClassifier((4,), **options).fit(x, y), FusedMLPClassifier((4,), **options)
    with pytest.raises(ValueError, match=r"^classes must be given to the first call of partial_fit, not None$"):
        parts.partial_fit(x, y)
    for call in range(4):
        parts.partial_fit(x, y, **({} if call else {"classes": [2, 0, 1]}))
    assert torch.equal(parameters(parts), parameters(whole))
    assert (parts.n_iter_, parts.loss_curve_) == (4, whole.loss_curve_)
    with pytest.raises(ValueError, match=r"^y must hold classes among \[0 1 2\], not \[7\]$"):
        parts.partial_fit(x, np.where(y, y, 7))
    with pytest.raises(ValueError, match=r"^classes must be \[0 1 2\], as in the first call, not \[0, 1\]$"):
        parts.partial_fit(x, y, classes=[0, 1])
    with pytest.raises(
        ValueError, match=r"^y must be one label of each sample, as in the calls before, not an indicator"
    ):
        parts.partial_fit(x, np.eye(3, dtype=int)[y])
    parts.partial_fit(x[y > 0], y[y > 0])  # of some classes only
    assert parts.predict_proba(x).shape == (60, 3)
    regressor = FusedMLPRegressor((4,), random_state=0).partial_fit(x, y).partial_fit(x, y)
    assert regressor.n_iter_ == 2


def test_training_ends_where_the_loss_no_longer_falls():
    x, y = blobs(3)
    options = {"random_state": 0, "max_iter": 3000, "learning_rate": 0.05}
    estimator = FusedMLPClassifier((4,), tol=1e-3, n_iter_no_change=5, **options).fit(x, y)
    curve = estimator.loss_curve_
    assert estimator.n_iter_ == len(curve) < 3000
    best, waited = np.inf, 0
    for loss in curve:
        assert waited < 5
        best, waited = min(loss, best), 0 if loss < best - 1e-3 else waited + 1
    assert waited == 5


@pytest.mark.parametrize("kind", ["classifier", "regressor"])
def test_early_stopping_keeps_the_best(kind, digits):
    x_train, x_test, y_train, y_test = digits
    make = FusedMLPClassifier if kind == "classifier" else FusedMLPRegressor
    x_train, x_test = x_train / 16, x_test / 16
    scale = 1 if kind == "classifier" else 9
    options = {"early_stopping": True, "validation_fraction": 0.2, "n_iter_no_change": 3, "max_iter": 200}
    estimator = make((32,), random_state=0, learning_rate=0.02, **options).fit(x_train, y_train / scale)
    scores = estimator.validation_scores_
    assert len(scores) == estimator.n_iter_ < 200
    best = int(np.argmax(scores))
    assert best <= len(scores) - 3
    assert estimator.score(x_test, y_test / scale) > (0.9 if kind == "classifier" else 0.7)
    again = make((32,), random_state=0, learning_rate=0.02, **(options | {"max_iter": best + 1}))
    assert torch.equal(parameters(again.fit(x_train, y_train / scale)), parameters(estimator))


@pytest.mark.more
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("name", ["iris", "wine", "breast_cancer", "digits", "diabetes"])
def test_as_accurate_as_scikit_learns_own(name):
    from sklearn import datasets
    from sklearn.model_selection import cross_val_score
    from sklearn.neural_network import MLPClassifier, MLPRegressor
    from sklearn.preprocessing import StandardScaler

    x, y = getattr(datasets, f"load_{name}")(return_X_y=True)
    classes = name != "diabetes"
    y = y if classes else (y - y.mean()) / y.std()
    ours, theirs = (FusedMLPClassifier, MLPClassifier) if classes else (FusedMLPRegressor, MLPRegressor)
    logistic = {"activation": "logistic", "learning_rate_init": 0.01}
    scores = []
    for make in (ours, functools.partial(theirs, **logistic)):
        # On these noisy targets one seed differs from the next by as much as is allowed.
        pipelines = [make_pipeline(StandardScaler(), make(random_state=seed)) for seed in range(1 if classes else 4)]
        scores.append(np.mean([cross_val_score(pipeline, x, y, cv=5).mean() for pipeline in pipelines]))
    assert scores[0] > scores[1] - 0.01


# --- numbers -----------------------------------------------------------------------------------------------


def test_no_hidden_layer_is_linear_regression():
    x, y = make_regression(n_samples=100, n_features=3, n_targets=2, noise=5, random_state=0)
    y /= y.std(0)
    options = {"solver": "sgd", "learning_rate": 0.2, "batch_size": None, "max_iter": 300, "random_state": 0}
    options["n_iter_no_change"] = None  # on its way the loss rises again and again
    estimator, truth = FusedMLPRegressor((), **options).fit(x, y), LinearRegression().fit(x, y)
    np.testing.assert_allclose(estimator.predict(x), truth.predict(x), atol=1e-5)
    assert estimator.score(x, y) == pytest.approx(truth.score(x, y), abs=1e-6)
    assert FusedMLPRegressor((), **options).fit(x, y[:, 0]).predict(x).shape == (100,)


# --- among scikit-learn's own ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    x, y = load_digits(return_X_y=True)
    return train_test_split(x, y, test_size=450, stratify=y, random_state=0)


def test_learns_digits_in_a_pipeline(digits):
    x, x_test, y, y_test = digits
    model = make_pipeline(MinMaxScaler(), FusedMLPClassifier(128, max_iter=40, random_state=0)).fit(x, y)
    # scikit-learn's own MLPClassifier comes to 0.978 with the same settings.
    assert model.score(x_test, y_test) > 0.95
    curve = model[-1].loss_curve_
    assert len(curve) == model[-1].n_iter_ == 40
    assert curve[-1] < 0.05 * curve[0]


@pytest.mark.more
def test_grid_search_in_two_processes(digits):
    x, _, y, _ = digits
    # numpy's numbers are what searches over distributions draw.
    grid = {"hidden_layer_sizes": [np.int64(64)], "learning_rate": [1e-6, 0.03]}
    estimator = FusedMLPClassifier(batch_size=np.int64(32), max_iter=20, random_state=0)
    search = GridSearchCV(estimator, grid, cv=2, n_jobs=2, error_score="raise").fit(x[:400] / 16, y[:400])
    assert search.best_params_ == {"hidden_layer_sizes": 64, "learning_rate": 0.03}
    worst, best = search.cv_results_["mean_test_score"]
    assert worst < 0.3
    assert best > 0.85
    alone = GridSearchCV(estimator, grid, cv=2).fit(x[:400] / 16, y[:400])
    # Other threads round in another order.
    assert alone.cv_results_["mean_test_score"] == pytest.approx([worst, best], abs=0.01)


# --- errors ------------------------------------------------------------------------------------------------

X, Y = [[0.0, 1.0], [1.0, 0.0]], [0, 1]
ERRORS = {
    "width-zero": ({"hidden_layer_sizes": (4, 0)}, Y, ValueError, "hidden_layer_sizes must be at least 1, not 0"),
    "width-float": ({"hidden_layer_sizes": 4.0}, Y, TypeError, "hidden_layer_sizes must be an int, not 4.0"),
    "activation": ({"activation": "gelu"}, Y, ValueError, "activation must be one of sigmoid, .*, not 'gelu'"),
    "solver": ({"solver": "lbfgs"}, Y, ValueError, "solver must be one of sgd, adam, adamw, not 'lbfgs'"),
    "solvers": ({"solver": ["adam"]}, Y, ValueError, r"solver must be one of sgd, adam, adamw, not \['adam'\]"),
    "impl": ({"impl": "fast"}, Y, ValueError, "impl must be one of .*, not 'fast'"),
    **{
        f"share-{share}": (
            {"early_stopping": True, "validation_fraction": share},
            Y,
            ValueError,
            f"validation_fraction must be a number between 0 and 1, not {share!r}",
        )
        for share in (0, 1.0, "a", float("nan"))
    },
    "no-epochs": ({"max_iter": 0}, Y, ValueError, "max_iter must be at least 1, not 0"),
    "batch-float": ({"batch_size": 2.5}, Y, TypeError, "batch_size must be an int, not 2.5"),
    "rate": ({"learning_rate": -1.0}, Y, ValueError, "learning_rate must be at least 0, not -1.0"),
    "rate-name": ({"learning_rate": "adaptive"}, Y, TypeError, "learning_rate must be a number, not 'adaptive'"),
    "tol": ({"tol": -1.0}, Y, ValueError, "tol must be at least 0, not -1.0"),
    "tol-none": ({"tol": None}, Y, TypeError, "tol must be a number, not None"),
    "decay": ({"weight_decay": float("nan")}, Y, ValueError, "weight_decay must be at least 0, not nan"),
    "one-class": ({}, [3, 3], ValueError, "y must hold at least two classes, not one class only: .*3"),
    "nan": ({}, [0.0, np.nan], ValueError, "Input y contains NaN"),
}


@pytest.mark.parametrize(("options", "y", "error", "message"), ERRORS.values(), ids=ERRORS)
def test_errors(options, y, error, message):
    estimator = FusedMLPClassifier(**options)
    with pytest.raises(error, match=message):
        estimator.fit(X, y)
    with pytest.raises(NotFittedError):
        estimator.predict(X)


@pytest.mark.parametrize("impl", ["torch", "native"])
def test_a_loop_that_is_asked_for_gives_the_same_numbers(impl, monkeypatch):
    """Whether compiled loops are there or not, which decides otherwise."""
    needs_numba(impl)
    x, y = blobs(3)
    estimators = []
    for seconds in (0.0, 1e9):
        monkeypatch.setattr("perceptriton.kernels.native.ready.seconds", lambda kind, s=seconds: (s, s, s))
        options = {"activation": "relu", "max_iter": 20, "n_iter_no_change": None, "random_state": 0}
        estimators.append(FusedMLPClassifier((8,), impl=impl, **options).fit(x, y))
    assert np.array_equal(*(estimator.predict_proba(x) for estimator in estimators))


@pytest.mark.parametrize("share", [np.float32(0.25), fractions.Fraction(1, 4)])
def test_a_share_may_be_any_number(share):
    x, y = blobs(3)
    options = {"early_stopping": True, "validation_fraction": share, "max_iter": 2, "random_state": 0}
    assert len(FusedMLPClassifier((4,), **options).fit(x, y).validation_scores_) == 2


def test_a_refused_fit_leaves_the_one_before():
    x, y = blobs(3)
    estimator = FusedMLPClassifier((4,), max_iter=2, early_stopping=True, random_state=0).fit(x, y)
    before = estimator.predict_proba(x)
    for wrong in ((x[:, :1], ["a"] * len(x)), (x[:, :1], y[:5]), (x * np.nan, y)):
        with pytest.raises(ValueError):  # noqa: PT011, whatever the message is
            estimator.fit(*wrong)
        assert np.array_equal(estimator.predict_proba(x), before)
    assert len(estimator.validation_scores_) == 2
    assert not hasattr(estimator.set_params(early_stopping=False).fit(x, y), "validation_scores_")


def test_what_diverges_says_so():
    x, y = blobs(2)
    regressor = FusedMLPRegressor((4,), activation="relu", solver="sgd", learning_rate=1e4, random_state=0)
    with pytest.raises(ValueError, match=r"^the parameters are not finite any more: scale X, or lower learning_rate="):
        regressor.fit(1e3 * x, 1e3 * y)


def test_sparse_labels():
    import scipy.sparse

    x, y = blobs(3)
    labels = np.eye(3, dtype=int)[y]
    own, other = (FusedMLPClassifier((4,), max_iter=3, random_state=0).fit(x, given) for given in (
        scipy.sparse.csr_matrix(labels), labels
    ))  # fmt: skip
    assert torch.equal(parameters(own), parameters(other))


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_targets_beyond_fp32_are_refused():
    with pytest.raises(ValueError, match="Input y contains infinity or a value too large"):
        FusedMLPRegressor().fit(X, [1.0, 1e39])


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "perceptriton.mlp.estimator")
    with pytest.raises(ImportError, match=r"scikit-learn 1\.6 or newer: install perceptriton\[sklearn\]$"):
        importlib.import_module("perceptriton.mlp.estimator")


# --- what is refused, and odd arrays -------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [FusedMLPClassifier, FusedMLPRegressor])
def test_a_refused_epoch_leaves_what_was_trained(kind, monkeypatch):
    x = np.random.RandomState(0).randn(60, 4)
    y = (x[:, 0] > 0).astype(int)
    first = {"classes": [0, 1]} if kind is FusedMLPClassifier else {}
    estimator = kind(hidden_layer_sizes=(50, 50), activation="relu", solver="sgd", random_state=0)
    estimator.partial_fit(x, y, **first)
    twin = copy.deepcopy(estimator).partial_fit(x, y)
    before, epochs = estimator.predict(x), estimator.n_iter_

    def diverges(model, *given, **options):
        fit(model, *given, **options)
        torch.nn.init.constant_(model[0].weight, torch.nan)
        return fit(model, *given, **options | {"nan": "propagate"})

    with monkeypatch.context() as patch:
        patch.setattr(base, "fit", diverges)
        with pytest.raises(ValueError, match="are not finite any more"):
            estimator.partial_fit(x, y)
    assert np.array_equal(estimator.predict(x), before)
    assert estimator.n_iter_ == epochs
    # It goes on as if nothing had happened.
    estimator.partial_fit(x, y)
    assert all(map(torch.equal, estimator.model_.parameters(), twin.model_.parameters()))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("solver", ["sgd", "adam"])
def test_an_interrupt_behind_the_training_leaves_what_was_trained(solver, inference, monkeypatch):
    x, y = np.random.RandomState(0).randn(60, 4), np.arange(60) % 2
    estimator = FusedMLPClassifier(4, solver=solver, random_state=0).partial_fit(x, y, classes=[0, 1])
    twin, model, before = copy.deepcopy(estimator), estimator.model_, vars(estimator).copy()

    def interrupted(*_, **options):
        raise KeyboardInterrupt

    for place in ("average", "array_equal"):  # in the midst of the books, and before the training
        with monkeypatch.context() as patch, torch.inference_mode(inference):
            patch.setattr(np, place, interrupted)
            with pytest.raises(KeyboardInterrupt):
                estimator.partial_fit(x, y, classes=[0, 1])
        assert vars(estimator) == before
    for one in (estimator, twin):
        one.partial_fit(x, y)
    assert estimator.model_ is model
    assert estimator.loss_curve_ == twin.loss_curve_
    assert all(map(torch.equal, model.parameters(), twin.model_.parameters()))


@pytest.mark.parametrize("labels", [(-1, 1), (0, 2), (1, 2)])
def test_indicators_are_0_and_1(labels):
    x = np.random.RandomState(0).randn(20, 3)
    y = np.where(x[:, :2] > 0, labels[1], labels[0])
    with pytest.raises(ValueError, match=r"^y must hold 0 and 1 where it is a matrix of several labels, not \["):
        FusedMLPClassifier().fit(x, y)


def test_classes_of_several_labels_are_the_columns():
    x = np.random.RandomState(0).randn(20, 3)
    y = (x > 0).astype(int)
    with pytest.raises(ValueError, match=r"^classes must be \[0 1 2\], the columns of y, not \[0, 1\]$"):
        FusedMLPClassifier().partial_fit(x, y, classes=[0, 1])
    estimator = FusedMLPClassifier().partial_fit(x, y, classes=[0, 1, 2]).partial_fit(x, y)
    assert estimator.predict(x).shape == (20, 3)


def test_scores_of_several_labels_are_exact_matches():
    x = np.random.RandomState(0).randn(100, 3)
    y = (x > 0).astype(int)
    estimator = FusedMLPClassifier(early_stopping=True, max_iter=30, random_state=0).fit(x, y)
    tenths = 10 * np.array(estimator.validation_scores_)
    assert np.allclose(tenths, tenths.round())
    assert max(tenths) < 10 or estimator.score(x, y) > 0.9


@pytest.mark.parametrize("kind", [FusedMLPClassifier, FusedMLPRegressor])
def test_arrays_that_run_backwards(kind):
    x = np.random.RandomState(0).randn(30, 4).astype(np.float32)
    y = (x[:, 0] > 0).astype(np.int64 if kind is FusedMLPClassifier else np.float32)
    options = {"max_iter": 3, "random_state": 0}
    backwards, copied = kind(**options).fit(x[::-1], y[::-1]), kind(**options).fit(x[::-1].copy(), y[::-1].copy())
    assert np.array_equal(backwards.predict(x[::-1]), copied.predict(x[::-1].copy()))


@pytest.mark.parametrize("early_stopping", [False, True])
def test_defaults_of_the_process_do_not_matter(early_stopping):
    x = np.random.RandomState(0).randn(40, 4)
    y = (x[:, 0] > 0).astype(int)
    options = {"max_iter": 5, "random_state": 0, "early_stopping": early_stopping}
    expected = FusedMLPClassifier(**options).fit(x, y).predict_proba(x)
    with torch.inference_mode():
        assert np.array_equal(FusedMLPClassifier(**options).fit(x, y).predict_proba(x), expected)
    with torch.device("meta"):
        assert np.array_equal(FusedMLPClassifier(**options).fit(x, y).predict_proba(x), expected)


@pytest.mark.parametrize(("sizes", "hidden"), [(np.array(5), [5]), (np.array([3, 2]), [3, 2]), ((), [])])
def test_hidden_sizes_may_be_arrays(sizes, hidden):
    x = np.random.RandomState(0).randn(20, 3)
    model = FusedMLPRegressor(sizes, max_iter=1).fit(x, x[:, 0]).model_
    assert [m.out_features for m in model if isinstance(m, nn.Linear)] == [*hidden, 1]
    with pytest.raises(TypeError, match="hidden_layer_sizes must be an int, not ''"):
        FusedMLPRegressor("").fit(x, x[:, 0])
