"""Pure update rules against torch.optim, step by step.

Protects: the recorded trajectory is the one that a replay re-executes.
"""

import pytest
import torch

from finfluence.errors import InputError
from finfluence.sensitivity import SGD, Adam, AdamW, FlatUpdate, SGDRule, from_torch, learning_rates

OPTIMIZERS = [
    SGD(lr=0.1),
    SGD(lr=0.1, weight_decay=0.05),
    SGD(lr=0.1, momentum=0.9),
    SGD(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.05),
    SGD(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.05),
    Adam(lr=0.01),
    Adam(lr=0.01, weight_decay=0.1, betas=(0.8, 0.95)),
    AdamW(lr=0.01, weight_decay=0.2),
    AdamW(lr=0.01, weight_decay=0.0, betas=(0.0, 0.9)),
]


def _rate(step: int) -> float:
    return 0.05 * (1.0 + step % 7) / 7.0


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)], ids=["f64", "f32"])
@pytest.mark.parametrize("configuration", OPTIMIZERS, ids=repr)
def test_fifty_steps_equal_torch(configuration, dtype, tolerance):
    """Gradients depend on the parameters (a quadratic plus noise, seed 1), so an error would feed back."""
    generator = torch.Generator().manual_seed(1)
    parameter = torch.randn(7, 3, generator=generator, dtype=dtype).requires_grad_()
    noise = torch.randn(50, 7, 3, generator=generator, dtype=dtype)
    optimizer = configuration.build([parameter])
    rule = configuration.rule
    theta = parameter.detach().clone()
    state = rule.init(theta)
    for step in range(50):
        optimizer.param_groups[0]["lr"] = _rate(step)
        parameter.grad = parameter.detach() + noise[step]
        before = theta.clone()
        theta_new, state_new = rule.update(theta, state, theta + noise[step], lr=_rate(step), step=step)
        assert torch.equal(theta, before)
        theta, state = theta_new, state_new
        optimizer.step()
        torch.testing.assert_close(theta, parameter.detach(), rtol=tolerance, atol=tolerance)
        for key, value in state.items():
            torch.testing.assert_close(value, optimizer.state[parameter][key], rtol=tolerance, atol=tolerance)


def test_mixed_param_groups_on_a_flat_vector_equal_torch():
    """Two rules and two rates, with names interleaved so that the flat order differs from the mapping's; seed 2."""
    generator = torch.Generator().manual_seed(2)
    shapes = {"a": (3, 2), "b": (4,), "c": (2, 2), "d": ()}
    parameters = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for name, shape in shapes.items()
    }
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters["a"], parameters["c"]], "weight_decay": 0.3},
            {"params": [parameters["b"], parameters["d"]], "weight_decay": 0.0, "lr": 0.03},
        ],
        lr=0.01,
    )
    update = FlatUpdate(parameters, from_torch(optimizer, parameters))
    assert update.layout.names == ("a", "c", "b", "d")
    assert [group.layout.size for group in update.groups] == [10, 5]
    theta = update.layout.flatten(parameters).detach()
    state = update.init(theta)
    for step in range(5):
        gradient = torch.randn(15, generator=generator, dtype=torch.float64)
        for name, value in update.layout.unflatten(gradient).items():
            parameters[name].grad = value.clone()
        theta, state = update.update(theta, state, gradient, lr=learning_rates(optimizer), step=step)
        optimizer.step()
    torch.testing.assert_close(theta, update.layout.flatten(parameters).detach(), rtol=1e-12, atol=1e-12)
    read, step = update.read_state(optimizer, parameters)
    assert step == 5
    for own, other in zip(state, read, strict=True):
        for key in own:
            torch.testing.assert_close(own[key], other[key], rtol=1e-12, atol=1e-12)


def test_layout_round_trip_and_means():
    tensors = {"w": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([10.0, 20.0])}
    update = FlatUpdate(tensors, SGDRule())
    layout = update.layout
    flat = layout.flatten(tensors)
    assert torch.equal(layout.unflatten(flat)["w"], tensors["w"])
    several = torch.stack([flat, 2 * flat])
    named = layout.unflatten(several)
    assert named["w"].shape == (2, 2, 3)
    assert torch.equal(layout.flatten(named), several)
    assert torch.equal(layout.means(flat), torch.tensor([2.5] * 6 + [15.0] * 2))
    assert torch.equal(layout.means(several)[1], 2 * layout.means(flat))


def test_layout_names_what_is_wrong():
    tensors = {"w": torch.ones(2, 3), "b": torch.ones(2)}
    layout = FlatUpdate(tensors, SGDRule()).layout
    with pytest.raises(InputError, match="'b'"):
        layout.flatten({"w": tensors["w"]})
    with pytest.raises(InputError, match=r"b has shape \(3,\)"):
        layout.flatten({"w": tensors["w"], "b": torch.ones(3)})
    with pytest.raises(InputError, match="float64"):
        FlatUpdate({"w": torch.ones(2), "b": torch.ones(2, dtype=torch.float64)}, SGDRule())
    with pytest.raises(InputError, match="parameter b"):
        FlatUpdate(tensors, {"w": from_torch(torch.optim.SGD([tensors["w"]], lr=0.1), {"w": tensors["w"]})["w"]})
