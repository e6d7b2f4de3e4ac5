"""`verify` and the recipes that make it possible from a run directory alone."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import finfluence as fi
from finfluence.errors import InputError
from finfluence.workflows import clean, load_recipe, removal_curve, verify
from finfluence.workflows.digits import digits, flip_labels, mlp
from finfluence.workflows.verification import curve_points


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fi.Run:
    recipe = digits(samples=200, epochs=4, seed=3)
    return recipe.train(tmp_path_factory.mktemp("verify") / "run", sensitivity="replay")


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
    p, q = last.truth.losses("validation", next(iter(last.truth.subsets)))
    assert last.means == pytest.approx((p.mean(), q.mean()))
    assert last.change_se == pytest.approx(np.std(q - p, ddof=1) / np.sqrt(32))
    assert f"from {p.mean():.4g} to {q.mean():.4g}" in str(last)


@pytest.mark.parametrize(
    ("asked", "epochs"),
    [("second-half", [2, 3, 4]), ("throughout", pytest.approx([4 * k / 6 for k in range(1, 7)]))],
    ids=["second-half", "throughout"],
)
def test_a_mean_over_epochs_is_verified_as_a_mean(tmp_path: Path, asked: Any, epochs: Any) -> None:
    options = fi.ReplayOptions(measure_epochs=asked)
    run = digits(samples=200, epochs=4, seed=3).train(tmp_path / "run", sensitivity="replay", replay_options=options)
    *_, last = verify(run, run.samples().filter("planted")["sample"].to_numpy(), runs=32, progress=False)
    assert last.truth.epochs == epochs
    assert (tmp_path / "run" / "verify-mean").is_dir()
    arm = last.truth.influence("validation", epoch="mean")["mu"][0]
    assert last.measured.mu == pytest.approx(arm)
    assert 0.4 < last.predicted.mu / last.measured.mu < 2.5


def test_precision_stops_early(run: fi.Run) -> None:
    states = list(verify(run, np.arange(10), runs=400, precision=3.0, progress=False))
    assert states[-1].finished
    assert len(states) < 400 / 16


def test_what_is_verified_is_kept_with_the_run_and_on_its_curve(run: fi.Run) -> None:
    path = Path(run.directory) / "verified.json"
    path.unlink(missing_ok=True)
    found = run.verify(np.arange(10), name="first ten", runs=8, progress=False)
    assert found.runs >= 8
    for point in curve_points(run, "validation", [5, "recommended"]):
        list(verify(run, point, query="validation", runs=8, progress=False))
    entries = json.loads(path.read_text(encoding="utf-8"))
    assert entries[0]["name"] == "first ten"
    assert set(entries[0]) >= {"query", "name", "size", "ids_hash", "k", "predicted", "measured", "runs"}
    assert entries[0]["k"] is None
    assert entries[1]["k"] == 5
    curve = removal_curve(run, "validation")
    assert curve.measured["k"].to_list() == sorted([5, curve.recommended])
    assert (curve.measured["mu"] < 0).all()
    # asked again with more runs, the entry is replaced
    list(verify(run, np.arange(10), name="first ten", runs=12, progress=False))
    again = json.loads(path.read_text(encoding="utf-8"))
    assert len(again) == len(entries)
    assert sum(entry["name"] == "first ten" for entry in again) == 1


def test_a_cut_is_verified_against_the_prediction_that_counts_the_choice(run: fi.Run) -> None:
    cleaning = clean(run, "validation", top=8)
    found = run.verify(cleaning, runs=8, progress=False)
    assert found.predicted == cleaning.predicted
    plain = run.verify(cleaning.dropped["sample"], runs=8, progress=False)
    assert plain.predicted.mu < found.predicted.mu < 0
    assert plain.measured.mu == found.measured.mu  # the same retrainings
    assert "8 samples" in found._repr_html_()
    with pytest.raises(InputError, match="nothing to verify"):
        run.verify(clean(run, "validation", fdr=1e-300))
    for bad in (0, 200):
        with pytest.raises(InputError, match="rows"):
            curve_points(run, "validation", [bad])


def test_data_that_changed_since_the_run_are_refused(run: fi.Run) -> None:
    recipe = load_recipe(run.manifest["recipe"])
    pixels, labels = recipe.dataset.tensors
    other = labels.clone()
    other[[17, 40]] = (other[[17, 40]] + 1) % 10
    changed = dataclasses.replace(recipe, dataset=torch.utils.data.TensorDataset(pixels, other))
    with pytest.raises(InputError, match="2 of 200 samples changed since the run, the first is 17"):
        next(verify(run, [1, 2], recipe=changed))
    fewer = dataclasses.replace(recipe, dataset=torch.utils.data.TensorDataset(pixels[:150], labels[:150]))
    with pytest.raises(InputError, match="150 samples now, the run was trained on 200"):
        next(verify(run, [1, 2], recipe=fewer))


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
