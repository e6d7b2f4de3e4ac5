"""Every way of taking per-sample derivatives equals a naive float64 loop over samples, on every architecture."""

from functools import cache

import pytest
import torch
from gradient_cases import CASES, build, error, naive, random_directions, trainable

from finfluence.errors import RecordingError
from finfluence.gradients import HookedDerivatives, per_sample_derivatives


@cache
def expected_of(name):
    """The naive loop's result for the case's three directions; a test of fewer takes the first columns."""
    model = build(CASES[name])
    return naive(CASES[name], model, random_directions(model, 3))


names = pytest.mark.parametrize("name", CASES)


@names
def test_hooks_equal_naive_loop(name):
    case = CASES[name]
    model = build(case)
    directions = random_directions(model, 3)
    expected = expected_of(name)
    weights = torch.linspace(0.2, 1.7, case.batch_size, dtype=torch.float64)
    hooks = HookedDerivatives(model, trainable(model))
    rows = torch.arange(case.batch_size)
    # Three records: structure found in the first must also be right in the first and after it settled.
    for scale in (torch.full_like(weights, 1 / case.batch_size), torch.ones_like(weights), weights):
        model.zero_grad()
        with hooks.record(directions, case.batch_size) as recording:
            (scale * case.losses(model, rows)).sum().backward()
        assert error(recording.values, expected * scale.unsqueeze(1)) < 1e-9
    assert hooks.uncovered() == []


def hooked(name):
    """A case for backward passes of our own: case, model, three directions, hooks."""
    if "reentrant" in name and "non-reentrant" not in name:
        pytest.skip("torch.autograd.grad does not work with re-entrant checkpointing")
    model = build(CASES[name])
    return CASES[name], model, random_directions(model, 3), HookedDerivatives(model, trainable(model))


@names
def test_backward_to_the_layers_outputs_alone(name):
    """Gradients of weights may only be left out where no value needs what comes with them, and p.grad stays."""
    case, model, directions, hooks = hooked(name)
    rows = torch.arange(case.batch_size)
    for _ in range(3):
        with hooks.record(directions, case.batch_size, partial=True) as recording:
            hooks.backward(case.losses(model, rows).sum())
        assert error(recording.values, expected_of(name)) < 1e-9
    assert all(p.grad is None for p in model.parameters())


CLOSED = {  # cases all of whose layers have closed forms
    "linear",
    "linear (b,t,d) with in-place relu",
    "linear (b,s,t,d)",
    "linear where width equals batch",
    "batch of one",
    "frozen",
    "shared module",
    "lora",
    "folded batch-major",
    "folded time-major",
    "norms",
    "norms (b,t,d)",
}


@names
def test_gradients_of_single_samples_or_a_refusal(name):
    """⟨G_i, q⟩ is the naive loop's value; layers without a closed form are refused, never left out."""
    case, model, directions, hooks = hooked(name)
    rows = torch.arange(case.batch_size)
    for _ in range(2):
        if name not in CLOSED:
            with pytest.raises(RecordingError, match="no closed form"), hooks.record_gradients(case.batch_size):
                hooks.backward(case.losses(model, rows).sum())
            continue
        with hooks.record_gradients(case.batch_size) as recording:
            hooks.backward(case.losses(model, rows).sum())
        gradients = recording.gradients
        columns = [
            torch.stack([(gradients[n] * t).flatten(1).sum(1) for n, t in q.tensors.items() if n in gradients]).sum(0)
            for q in directions
        ]
        assert error(torch.stack(columns, dim=1), expected_of(name)) < 1e-9


@names
def test_hooks_in_float32(name):
    case = CASES[name]
    model = build(case)
    directions = random_directions(model, 1)
    expected = expected_of(name)[:, :1]
    model = model.float()
    got = per_sample_derivatives(
        lambda m: case.losses(m, torch.arange(case.batch_size)),
        model,
        parameters=trainable(model),
        directions=directions,
    )
    assert got.dtype == torch.float32
    assert error(got, expected) < 1e-4


@names
@pytest.mark.parametrize("method", ["jvp", "finite-difference"])
def test_other_ways_equal_naive_loop(name, method):
    case = CASES[name]
    model = build(case)
    directions = random_directions(model, 3)
    expected = expected_of(name)
    weights = torch.linspace(0.2, 1.7, case.batch_size)
    if name == "weight norm" and method == "jvp":
        pytest.skip("torch has no forward mode for it: see test_jvp_names_the_operator_it_lacks")
    before = case.losses(model, torch.arange(case.batch_size))
    got = per_sample_derivatives(
        lambda m: case.losses(m, torch.arange(case.batch_size)),
        model,
        parameters=trainable(model),
        directions=directions,
        method=method,
        weights=weights,
    )
    assert error(got, expected * weights.unsqueeze(1)) < (1e-9 if method == "jvp" else case.fd)
    # The model is left as it was, also where a module or weight occurs in several places.
    assert torch.equal(case.losses(model, torch.arange(case.batch_size)), before)


@names
def test_recording_leaves_training_bit_identical(name):
    case = CASES[name]
    gradients = []
    for recorded in (False, True):
        model = build(case, torch.float32)
        hooks = HookedDerivatives(model, trainable(model))
        torch.manual_seed(4)
        for _ in range(2):
            if recorded:
                with hooks.record(random_directions(model, 2), case.batch_size):
                    case.losses(model, torch.arange(case.batch_size)).mean().backward()
            else:
                case.losses(model, torch.arange(case.batch_size)).mean().backward()
        gradients.append(([p.grad for p in trainable(model).values()], torch.get_rng_state()))
    (plain, plain_rng), (recorded, recorded_rng) = gradients
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded, strict=True))
    assert torch.equal(plain_rng, recorded_rng)
