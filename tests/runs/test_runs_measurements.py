"""What can be asked of a model: a mean loss, a contrast of two, any function; live, replayed and by retraining.

Protects: a contrast is the difference of its sides in every part of the library (signals are linear in the query's
gradient), and a function query gives what the batch that it computes gives.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs_problems as problems
import torch
from torch import Tensor, nn

import finfluence as fi
from finfluence.errors import InputError
from finfluence.runs import Contrast
from finfluence.runs.data import batch_length, query_batch
from finfluence.runs.oracle import Processes, fingerprint
from finfluence.runs.tasks import measurement

FIRST, SECOND = problems.data(6, seed=4), problems.data(6, seed=5)


def first_loss(model: Any) -> Tensor:
    x, y = FIRST.tensors
    return nn.functional.cross_entropy(model(x), y)


QUERIES: dict[str, Any] = {
    "first": FIRST,
    "second": SECOND,
    "contrast": Contrast(FIRST, SECOND.tensors),
    "half": Contrast(FIRST, SECOND, weight=0.5),
    "function": first_loss,
}


@pytest.mark.parametrize("sensitivity", ["live", "replay"])
def test_signals_of_a_contrast_are_the_difference_of_its_sides(tmp_path: Path, sensitivity: Any) -> None:
    run = problems.record(tmp_path / "run", queries=QUERIES, sensitivity=sensitivity)
    signals = run.signals().collect().sort("step", "sample")
    first, second = signals["first"].to_numpy(), signals["second"].to_numpy()
    scale = np.abs(first).max()
    np.testing.assert_allclose(signals["contrast"].to_numpy(), first - second, atol=1e-6 * scale)
    np.testing.assert_allclose(signals["half"].to_numpy(), first - second / 2, atol=1e-6 * scale)
    np.testing.assert_allclose(signals["function"].to_numpy(), first, atol=1e-6 * scale)
    assert np.abs(first - second).max() > 0.1 * scale


@pytest.mark.parametrize("executor", ["ensemble", Processes(workers=1)], ids=["ensemble", "processes"])
def test_retraining_measures_what_is_recorded(tmp_path: Path, executor: Any) -> None:
    truth = fi.retrain(
        fi.ClassificationTask(),
        problems.model,
        problems.data(),
        QUERIES,
        subsets={"some": [1, 2, 3]},
        optimizer=fi.SGD(lr=0.2),
        epochs=1,
        batch_size=8,
        runs=4,
        executor=executor,
        directory=tmp_path / "truth",
        progress=False,
    )
    losses = {name: truth.losses(name, "some") for name in QUERIES}
    for arm in (0, 1):
        value = {name: np.asarray(pair[arm]) for name, pair in losses.items()}
        np.testing.assert_allclose(value["contrast"], value["first"] - value["second"], atol=1e-6)
        np.testing.assert_allclose(value["half"], value["first"] - value["second"] / 2, atol=1e-6)
        np.testing.assert_allclose(value["function"], value["first"], atol=1e-6)


def test_a_contrast_needs_an_answer_of_each_kind_for_every_prompt() -> None:
    with pytest.raises(InputError, match="sides have 6 and 5 samples"):
        query_batch(Contrast(FIRST, problems.data(5, seed=5)))
    assert batch_length(query_batch(QUERIES["contrast"])) == 12
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="weight of a contrast"):
            Contrast(FIRST, SECOND, weight=weight)


def test_what_is_no_query_is_refused() -> None:
    with pytest.raises(InputError, match="a function of the model, got int"):
        query_batch(3)


def test_fingerprints_tell_contrasts_and_functions_apart() -> None:
    """A resumed retraining compares them, so they may not depend on where an object lies in memory."""

    def other(model: Any) -> Tensor:
        return first_loss(model)

    assert fingerprint.of_batch(first_loss) == fingerprint.of_batch(first_loss) != fingerprint.of_batch(other)
    contrast = query_batch(QUERIES["contrast"])
    again = query_batch(Contrast(problems.data(6, seed=4), problems.data(6, seed=5)))
    swapped = Contrast(contrast.second, contrast.first)
    assert fingerprint.of_batch(contrast) == fingerprint.of_batch(again) != fingerprint.of_batch(swapped)
    assert fingerprint.of_batch(contrast) != fingerprint.of_batch(query_batch(QUERIES["half"]))


class _WithoutHead(nn.Module):
    def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
        return {"last_hidden_state": torch.zeros(*input_ids.shape, 4)}


def test_a_model_without_logits_is_named() -> None:
    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.raises(InputError, match="the model returned dict; load it with its language-model head"):
        measurement(fi.CausalLMTask(), _WithoutHead(), {"input_ids": ids})
    with pytest.raises(InputError, match=r"returned logits of shape \(2, 4\)"):
        measurement(fi.CausalLMTask(), lambda input_ids: torch.zeros(2, 4), {"input_ids": ids})
