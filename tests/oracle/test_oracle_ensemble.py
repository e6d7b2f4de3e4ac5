"""The ensemble executor: stacked trainings give what single trainings give, and what cannot be stacked says so."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from oracle_problems import (
    CLASSES,
    FEATURES,
    MARKER,
    N,
    dataset,
    experiment,
    jobs_of,
    largest_difference,
    mlp,
    outcomes_of,
    queries,
    values_of,
)
from torch import nn
from torch.utils.data import Dataset

from finfluence.errors import InputError, OracleError
from finfluence.runs.oracle import Ensemble
from finfluence.runs.oracle.executors._cross_entropy import FewClassCrossEntropy
from finfluence.runs.plan import Schedule
from finfluence.runs.sampling import Sampler
from finfluence.runs.tasks import ClassificationTask
from finfluence.sensitivity import SGD, Adam, AdamW

# relative, of losses after some twenty float32 steps, which amplify rounding; a wrong batch changes them by percents
TOLERANCE = 2e-4


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"clip_norm": 0.3, "initialisation": "random"},
        {"sampler": Sampler(drop_last=True)},
        {"sampler": Sampler("with-replacement"), "clip_norm": 0.3},
        {"sampler": Sampler("poisson")},
        {"optimizer": AdamW(lr=0.03)},
        {"optimizer": AdamW(lr=0.03), "clip_norm": 0.3, "sampler": Sampler(drop_last=True)},
        {"optimizer": Adam(lr=0.03, weight_decay=0.01), "initialisation": "random"},
        {"optimizer": SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)},
        {"schedule": Schedule("cosine", warmup_steps=4), "accumulation": 3},
        {"measure_epochs": [1, 2], "budget": "epochs", "subsets": {"half": list(range(26)), "single": [11]}},
        {"queries": {"dataset": dataset()}},
    ],
    ids=lambda changes: ",".join(changes) or "plain",
)
def test_equals_single_trainings(tmp_path: Any, changes: dict[str, Any]) -> None:
    """Arms of different sizes share a chunk; every one must get exactly its own batches, weights and updates."""
    problem = experiment(tmp_path, **changes).problem
    jobs = jobs_of(problem, 3)
    assert largest_difference(outcomes_of(Ensemble(), problem, jobs), problem) < TOLERANCE


def test_chunks_and_threads_do_not_change_results(tmp_path: Any) -> None:
    problem = experiment(tmp_path, initialisation="random").problem
    jobs = jobs_of(problem, 5)
    threads = torch.get_num_threads()
    whole = outcomes_of(Ensemble(), problem, jobs)
    pieces = outcomes_of(Ensemble(chunk=2, workers=2), problem, jobs)
    for job in jobs:
        np.testing.assert_allclose(values_of(whole[job]), values_of(pieces[job]), rtol=TOLERANCE)
    assert torch.get_num_threads() == threads


def test_leaves_the_global_random_state_alone(tmp_path: Any) -> None:
    problem = experiment(tmp_path, initialisation="random").problem
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    outcomes_of(Ensemble(), problem, jobs_of(problem, 1))
    assert torch.equal(torch.rand(3), expected)


def _normalised(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES))


def test_batch_normalisation_keeps_statistics_of_each_model(tmp_path: Any) -> None:
    """Padding must not enter batch statistics, and running statistics belong to one model each."""
    problem = experiment(tmp_path, make_model=_normalised).problem
    assert largest_difference(outcomes_of(Ensemble(), problem, jobs_of(problem, 2)), problem) < TOLERANCE
    with pytest.raises(OracleError, match="batch normalisation"):
        Ensemble().open(experiment(tmp_path / "p", make_model=_normalised, sampler=Sampler("poisson")).problem)


def _partly_frozen(seed: int) -> nn.Module:
    model = mlp(seed)
    for parameter in list(model.parameters())[:2]:
        parameter.requires_grad_(False)
    return model


@pytest.mark.parametrize("initialisation", ["fixed", "random"])
def test_frozen_parameters_stay(tmp_path: Any, initialisation: str) -> None:
    problem = experiment(tmp_path, make_model=_partly_frozen, initialisation=initialisation).problem
    assert largest_difference(outcomes_of(Ensemble(), problem, jobs_of(problem, 2)), problem) < TOLERANCE


def _double(seed: int) -> nn.Module:
    return mlp(seed).double()


def test_double_precision_is_kept(tmp_path: Any) -> None:
    data = dataset()
    data.tensors = (data.tensors[0].double(), data.tensors[1])
    asked = {name: (x.double(), y) for name, (x, y) in queries().items()}
    problem = experiment(tmp_path, make_model=_double, dataset=data, queries=asked).problem
    assert largest_difference(outcomes_of(Ensemble(), problem, jobs_of(problem, 2)), problem) < 1e-11


def _dropout(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, 16), nn.Tanh(), nn.Dropout(0.5), nn.Linear(16, CLASSES))


def test_dropout_has_the_same_law(tmp_path: Any) -> None:
    """Mean and spread over 200 runs agree with single trainings: seeds fixed; |z| > 4.5 has p = 1e-5 a query."""
    problem = experiment(tmp_path, make_model=_dropout, subsets={"single": [11]}).problem
    jobs = [job for job in jobs_of(problem, 200) if job.arm == "base"]
    stacked = outcomes_of(Ensemble(), problem, jobs)
    again = outcomes_of(Ensemble(), problem, jobs)
    from finfluence.runs.oracle.single import train_one

    a = np.array([values_of(stacked[job])[0] for job in jobs])
    b = np.array([values_of(train_one(problem, job))[0] for job in jobs])
    assert np.array_equal(a, [values_of(again[job])[0] for job in jobs])
    assert len(np.unique(a[:, 0])) == len(jobs)
    z = (a.mean(0) - b.mean(0)) / np.sqrt((a.var(0) + b.var(0)) / len(jobs))
    assert np.abs(z).max() < 4.5
    assert np.abs(np.log(a.std(0) / b.std(0))).max() < 0.35


class _Peeks(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum().item() > 0 else -x


def _peeking(seed: int) -> nn.Module:
    return nn.Sequential(mlp(seed), _Peeks())


def test_unsupported_module_is_named(tmp_path: Any) -> None:
    problem = experiment(tmp_path, make_model=_peeking).problem
    with pytest.raises(OracleError, match=r"item\(\).*'1' \(_Peeks\).*processes"):
        outcomes_of(Ensemble(), problem, jobs_of(problem, 1))


class _Broken(ClassificationTask):
    def losses(self, model: Any, batch: Any) -> torch.Tensor:
        raise KeyError("labels")


def test_a_task_that_fails_by_itself_says_why(tmp_path: Any) -> None:
    problem = experiment(tmp_path, task=_Broken()).problem
    with pytest.raises(OracleError, match=r"KeyError: 'labels' \(in _Broken\)"):
        outcomes_of(Ensemble(), problem, jobs_of(problem, 1))


class _Reduced(ClassificationTask):
    def losses(self, model: Any, batch: Any) -> torch.Tensor:
        return super().losses(model, batch).mean()


def test_losses_of_the_wrong_shape(tmp_path: Any) -> None:
    problem = experiment(tmp_path, task=_Reduced()).problem
    with pytest.raises(InputError, match="one loss a sample"):
        outcomes_of(Ensemble(), problem, jobs_of(problem, 1))


class _Augmented(Dataset):
    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        inputs, target = dataset()[i]
        return inputs + torch.rand(FEATURES), target


def test_random_augmentation_is_refused(tmp_path: Any) -> None:
    with pytest.raises(OracleError, match="augmentation"):
        Ensemble().open(experiment(tmp_path, dataset=_Augmented()).problem)


class _Explodes(ClassificationTask):
    """The loss of sample 0 is infinite, so the arms that keep it fail and the arm without it does not."""

    def losses(self, model: Any, batch: Any) -> torch.Tensor:
        broken = (batch[0] == MARKER).all(1)
        return torch.where(broken, float("inf"), super().losses(model, batch))


def test_a_broken_training_does_not_touch_its_neighbours(tmp_path: Any) -> None:
    problem = experiment(tmp_path, task=_Explodes()).problem
    found = outcomes_of(Ensemble(), problem, jobs_of(problem, 2))
    healthy = {job: o for job, o in found.items() if len(problem.arms[job.arm].removed) == 7}
    assert largest_difference(healthy, problem) < TOLERANCE
    for job, outcome in found.items():
        if job not in healthy:
            assert outcome.values is None
            assert outcome.error is not None
            assert re.search("(infinite|nan) at step", outcome.error)


def test_chunks_are_bounded_by_memory(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = experiment(tmp_path).problem
    session = Ensemble(workers=1).open(problem)
    jobs = jobs_of(problem, 40)
    cost = session.cost(jobs[0])
    assert cost.step_bytes > 3 * sum(p.numel() * 4 for p in mlp(0).parameters())

    class Scarce:
        available = cost.step_bytes * 4 * 5 + 1

    monkeypatch.setattr("psutil.virtual_memory", lambda: Scarce)
    chunks, _ = session.plan(jobs)
    assert max(map(len, chunks)) <= 5
    assert sorted(job for chunk in chunks for job in chunk) == sorted(jobs)


def test_options_are_checked() -> None:
    with pytest.raises(InputError, match="chunk"):
        Ensemble(chunk=0)


def test_few_class_cross_entropy_equals_torch() -> None:
    """Values and gradients, ignored targets included; other calls pass through."""
    generator = torch.Generator().manual_seed(3)
    logits = (30 * torch.randn(40, 10, generator=generator, dtype=torch.float64)).requires_grad_()
    targets = torch.randint(0, 10, (40,), generator=generator)
    targets[:3] = -100
    cross_entropy = nn.functional.cross_entropy
    for smoothing in (0.0, 0.1):
        expected = cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        with FewClassCrossEntropy():
            found = cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
            assert cross_entropy(logits, targets).dim() == 0
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        for a, b in zip(*(torch.autograd.grad(x.sum(), logits) for x in (found, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
