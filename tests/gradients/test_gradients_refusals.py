"""What the kernel refuses, and that it says what to do instead."""

import pytest
import torch
from gradient_cases import CASES, build, random_directions, trainable
from torch import nn

from finfluence.errors import InputError, RecordingError
from finfluence.gradients import Direction, HookedDerivatives, LinearFactors, check_model, per_sample_derivatives


def test_wrong_use_is_refused_with_the_remedy():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    hooks = HookedDerivatives(model, trainable(model))
    q = random_directions(model, 1)
    with pytest.raises(RecordingError, match="both the forward and the backward"), hooks.record(q, 5):
        pass
    with pytest.raises(RecordingError, match="number of ids"), hooks.record(q, 7):
        model(torch.randn(5, 4)).sum().backward()
    with pytest.raises(RecordingError, match="already running"), hooks.record(q, 5), hooks.record(q, 5):
        pass
    with pytest.raises(InputError, match="batch_size is 0"), hooks.record(q, 0):
        pass
    with pytest.raises(InputError, match="0 directions"), hooks.record([], 5):
        pass
    with pytest.raises(InputError, match=r"shape \(3,\)"), hooks.record([Direction({"0.weight": torch.ones(3)})], 5):
        pass
    with (
        pytest.raises(InputError, match="not a recorded parameter"),
        hooks.record([Direction({"x": torch.ones(3)})], 5),
    ):
        pass
    with pytest.raises(RecordingError, match="0 trainable"):
        HookedDerivatives(model, {})


def test_modules_that_couple_samples_are_refused():
    norm = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with pytest.raises(RecordingError, match=r"'1' is a BatchNorm1d in training mode.*GroupNorm"):
        HookedDerivatives(norm, trainable(norm))
    check_model(norm.eval())
    with pytest.raises(RecordingError, match="without running statistics"):
        check_model(nn.BatchNorm2d(3, track_running_stats=False).eval())
    with pytest.raises(RecordingError, match="scale_grad_by_freq"):
        check_model(nn.Embedding(3, 2, scale_grad_by_freq=True))
    with pytest.raises(RecordingError, match="max_norm"):
        check_model(nn.Embedding(3, 2, max_norm=1.0))


def test_jvp_names_the_operator_it_lacks():
    case = CASES["weight norm"]
    model = build(case)
    with pytest.raises(RecordingError, match=r"_weight_norm_interface.*finite-difference"):
        per_sample_derivatives(
            lambda m: case.losses(m, torch.arange(5)),
            model,
            parameters=trainable(model),
            directions=random_directions(model, 1),
            method="jvp",
        )


def test_losses_must_be_one_a_sample():
    model = nn.Linear(3, 2)
    arguments = {"parameters": trainable(model), "directions": random_directions(model, 1)}
    for method in ("hooks", "jvp", "finite-difference"):
        with pytest.raises(InputError, match="reduction='none'"):
            per_sample_derivatives(lambda m: m(torch.ones(4, 3)).sum(), model, **arguments, method=method)
    with pytest.raises(InputError, match="'exact'"):
        per_sample_derivatives(lambda m: m(torch.ones(4, 3)).sum(1), model, **arguments, method="exact")
    with pytest.raises(InputError, match=r"weights have shape \(3,\)"):
        per_sample_derivatives(lambda m: m(torch.ones(4, 3)).sum(1), model, **arguments, weights=torch.ones(3))


def test_factors_must_have_the_same_rows():
    with pytest.raises(InputError, match=r"\(2, 3\) and \(4, 5\)"):
        LinearFactors(torch.ones(2, 3), torch.ones(4, 5))
