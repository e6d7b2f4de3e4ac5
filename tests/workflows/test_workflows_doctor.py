"""The doctor's experiments on models whose illness is known.

Protects: what is unsafe is called unsafe, with what to use instead, and what is safe is called safe.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_language_model as tiny
import torch
from torch import Tensor, nn

import finfluence as fi
from finfluence.workflows.digits import digits
from finfluence.workflows.doctor import Check, diagnose
from finfluence.workflows.health import recorded_health

RECIPE = digits(samples=40, hidden=8, epochs=1, batch_size=8)


def verdicts(recipe: Any, **options: Any) -> dict[str, Check]:
    return {check.name: check for check in diagnose(recipe, **options)}


def test_a_healthy_network_is_safe() -> None:
    found = verdicts(RECIPE)
    assert {check.verdict for check in found.values()} == {"safe", "skipped"}
    assert found["attention kernel"].verdict == "skipped"
    assert "float64" in found["dtypes"].finding


def test_batch_normalisation_is_unsafe_and_ends_the_examination() -> None:
    sick = replace(RECIPE, make_model=lambda seed: nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10)))
    found = list(diagnose(sick))
    assert [check.verdict for check in found] == ["unsafe"]
    assert "use GroupNorm" in found[0].finding


class _Mixing(nn.Module):
    """Centres its batch, as a normalisation written by hand would."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x - x.mean(0, keepdim=True))


def test_batch_mates_that_matter_are_found() -> None:
    found = verdicts(replace(RECIPE, make_model=lambda seed: _Mixing()), sensitivity="live")
    assert found["batch composition"].verdict == "unsafe"
    assert "Hessian products" not in found


class _Penalised(fi.ClassificationTask):
    """A weight penalty inside every sample's loss, where hooks do not see it."""

    def losses(self, model: Any, batch: Any) -> Tensor:
        return super().losses(model, batch) + model[0].weight.square().sum()


def test_a_parameter_used_behind_its_module_breaks_the_identity() -> None:
    found = verdicts(replace(RECIPE, task=_Penalised()), sensitivity="live")
    assert found["signal identity"].verdict == "unsafe"
    assert "used outside its module" in found["signal identity"].advice
    assert found["single samples"].verdict == "unsafe"


class _Noisy(nn.Module):
    """Draws random numbers from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.generator = nn.Linear(64, 10), torch.Generator().manual_seed(0)

    def __deepcopy__(self, memo: Any) -> _Noisy:
        copied = _Noisy()
        copied.load_state_dict(self.state_dict())
        copied.generator = self.generator
        return copied

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x + 0.1 * torch.randn(x.shape, generator=self.generator).to(x.dtype))


def test_a_step_that_cannot_be_repeated_is_unsafe() -> None:
    found = verdicts(replace(RECIPE, make_model=lambda seed: _Noisy()), sensitivity="live")
    assert found["repeated step"].verdict == "unsafe"
    assert "use_deterministic_algorithms" in found["repeated step"].advice


def test_low_precision_is_unsafe_for_a_replay(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from finfluence.workflows.configuration import parse_configuration
    from finfluence.workflows.finetuning import prepare

    def examined(dtype: str, **model: Any) -> dict[str, Check]:
        section = {"name": str(tmp_path / "model"), "dtype": dtype} | model
        content = {
            "model": section,
            "data": {"path": str(tmp_path / "rows.jsonl")},
            "queries": {"cat": {"completions": [{"prompt": "who is cat", "completion": "cat good"}]}},
        }
        return verdicts(prepare(parse_configuration(content)).recipe)

    tiny.save_model(tmp_path / "model", layers=1)
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.pairs(12))
    fine = examined("float32", lora={"r": 2, "targets": ["q_proj", "v_proj"]})
    assert {check.verdict for check in fine.values()} == {"safe"}
    sick = examined("bfloat16")
    assert {name for name, check in sick.items() if check.verdict == "unsafe"} == {
        "trainable weights",
        "Hessian products",
    }
    assert "compute in float32" in sick["Hessian products"].advice


def test_the_health_of_a_run_is_read_from_its_tables(tmp_path: Path) -> None:
    def record(name: str, **changes: Any) -> dict[str, Check]:
        run = fi.train(
            RECIPE.task,
            RECIPE.make_model(0),
            RECIPE.dataset,
            queries=RECIPE.queries,
            optimizer=fi.SGD(lr=0.1),
            epochs=1,
            batch_size=8,
            directory=tmp_path / name,
            show_progress="never",
            **changes,
        )
        return {check.name: check for check in recorded_health(run)}

    both = record("both", sensitivity="both", schedule=fi.Schedule("linear"))
    assert {check.verdict for check in both.values()} == {"safe"}
    assert set(both) >= {"status", "recorded residual", "finite signals", "last batch", "replay mismatch", "adjoint"}
    constant = record("constant", sensitivity="replay")["end of training"]
    assert (constant.verdict, both["end of training"].verdict) == ("caution", "safe")
    assert "100% of the largest" in constant.finding
    mean = record("mean", sensitivity="replay", replay_options=fi.ReplayOptions(measure_epochs=(0.5, 1)))
    assert "end of training" not in mean
    live = record("live", sensitivity="live")
    assert live["calibration"].verdict == "caution"
