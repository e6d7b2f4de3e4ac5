"""`verify` and the recipes that make it possible from a run directory alone."""

import numpy as np
import pytest
import torch

import finfluence as fi
from finfluence.errors import InputError
from finfluence.workflows import load_recipe, verify
from finfluence.workflows.digits import digits, flip_labels, mlp


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fi.Run:
    recipe = digits(samples=200, epochs=4, seed=3)
    return fi.train(
        recipe.task,
        recipe.make_model(recipe.plan.seed),
        recipe.dataset,
        queries=recipe.queries,
        optimizer=recipe.plan.optimizer,
        epochs=recipe.plan.epochs,
        batch_size=recipe.plan.batch_size,
        seed=recipe.plan.seed,
        sensitivity="replay",
        samples=recipe.samples,
        recipe=recipe.reference,
        directory=tmp_path_factory.mktemp("verify") / "run",
    )


def test_a_recipe_is_rebuilt_from_the_run(run: fi.Run) -> None:
    recipe = load_recipe(run.manifest["recipe"])
    assert recipe.plan == fi.Plan.from_dict(run.manifest["plan"])
    assert torch.equal(recipe.dataset.tensors[0], digits(samples=200, epochs=4, seed=3).dataset.tensors[0])


def test_measured_mu_agrees_with_prediction_for_the_flipped_labels(run: fi.Run) -> None:
    ids = run.samples().filter("planted")["sample"].to_numpy()
    states = list(verify(run, ids, runs=32, progress=False))
    last = states[-1]
    assert [s.finished for s in states] == [False] * (len(states) - 1) + [True]
    assert last.runs == 32
    # Both are clearly harmful (about -3 noise units); a wrong sign or scale would be far outside.
    assert last.predicted.mu < -1
    assert last.measured.mu < -1
    assert 0.4 < last.predicted.mu / last.measured.mu < 2.5
    assert "lowers the measurement" in str(last)


def test_precision_stops_early(run: fi.Run) -> None:
    states = list(verify(run, np.arange(10), runs=400, precision=3.0, progress=False))
    assert states[-1].finished
    assert len(states) < 400 / 16


def test_a_run_without_recipe_says_what_to_do(run: fi.Run) -> None:
    bare = fi.open_run(run.directory)
    bare.manifest["recipe"] = None
    with pytest.raises(InputError, match="recipe"):
        next(verify(bare, [1, 2]))


@pytest.mark.parametrize(
    "reference", [{"function": "nowhere:nothing"}, {"function": "finfluence.workflows.digits:mlp"}]
)
def test_unusable_recipes_are_input_errors(reference: dict[str, str]) -> None:
    with pytest.raises((InputError, TypeError)):
        load_recipe(reference)


def test_flips_change_exactly_the_asked_share_to_other_classes() -> None:
    labels = np.arange(1000) % 10
    noisy, flipped = flip_labels(labels, 0.1, classes=10, seed=0)
    assert flipped.sum() == 100
    assert ((noisy != labels) == flipped).all()
    assert noisy.min() >= 0
    assert noisy.max() <= 9


def test_initial_parameters_are_a_function_of_the_seed() -> None:
    state = torch.get_rng_state()
    assert torch.equal(mlp(1)[0].weight, mlp(1)[0].weight)
    assert not torch.equal(mlp(1)[0].weight, mlp(2)[0].weight)
    assert torch.equal(torch.get_rng_state(), state)
