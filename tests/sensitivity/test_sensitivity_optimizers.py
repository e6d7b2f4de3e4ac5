"""Optimizer configurations and the reading of torch optimizers.

Protects: validation, the JSON round trip, strictness about what is unknown.
"""

import json

import pytest
import torch

from finfluence.errors import InputError, RecordingError
from finfluence.sensitivity import (
    SGD,
    Adam,
    AdamRule,
    AdamW,
    SGDRule,
    from_dict,
    from_torch,
    learning_rates,
    live_direction,
    read_state,
)

CONFIGURATIONS = [
    SGD(lr=0.1),
    SGD(lr=0.1, momentum=0.9, dampening=0.2, weight_decay=1e-3),
    SGD(lr=0.1, momentum=0.9, nesterov=True),
    Adam(betas=(0.8, 0.99), weight_decay=0.1),
    AdamW(lr=3e-4, eps=1e-6),
]


def _parameters() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(3, 2, generator=generator).requires_grad_(),
        "b": torch.randn(2, generator=generator).requires_grad_(),
    }


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=repr)
def test_survives_json(configuration):
    assert from_dict(json.loads(json.dumps(configuration.as_dict()))) == configuration


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=repr)
def test_build_and_read_back_give_the_same_rule(configuration):
    parameters = _parameters()
    optimizer = configuration.build(parameters.values())
    rules = from_torch(optimizer, parameters)
    assert list(rules) == ["w", "b"]
    assert {entry.rule for entry in rules.values()} == {configuration.rule}
    assert learning_rates(optimizer) == (configuration.lr,)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: SGD(lr=-1.0), "lr is -1.0"),
        (lambda: SGD(lr=float("nan")), "lr is nan"),
        (lambda: SGD(lr="0.1"), "lr is '0.1'"),
        (lambda: SGD(lr=0.1, momentum=1.0), "momentum is 1.0"),
        (lambda: SGD(lr=0.1, nesterov=True), "nesterov"),
        (lambda: SGD(lr=0.1, momentum=0.9, dampening=0.1, nesterov=True), "dampening 0.1"),
        (lambda: Adam(betas=(0.9, 1.0)), r"betas\[1\] is 1.0"),
        (lambda: Adam(betas=(0.9,)), "betas is"),
        (lambda: AdamW(eps=-1e-8), "eps is -1e-08"),
        (lambda: AdamW(weight_decay=True), "weight_decay is True"),
        (lambda: from_dict({"name": "lion"}), "name is 'lion'"),
        (lambda: from_dict({"name": "sgd"}), "needs lr"),
        (lambda: from_dict({"name": "adam", "momentum": 0.9}), "no option momentum"),
    ],
)
def test_bad_configurations_name_the_value(make, named):
    with pytest.raises(InputError, match=named) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_param_groups_keep_their_own_options():
    parameters = _parameters()
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters["w"]], "weight_decay": 0.5},
            {"params": [parameters["b"]], "weight_decay": 0.0, "lr": 1e-2},
        ],
        lr=1e-3,
        foreach=True,
    )
    rules = from_torch(optimizer, parameters)
    assert rules["w"].rule == AdamRule(weight_decay=0.5, decay="decoupled")
    assert rules["b"].rule == AdamRule(weight_decay=0.0, decay="decoupled")
    assert [rules[name].rate_group for name in ("w", "b")] == [0, 1]
    assert learning_rates(optimizer) == (1e-3, 1e-2)


def test_adam_with_decoupled_decay_is_read_as_adamw():
    parameters = _parameters()
    optimizer = torch.optim.Adam(parameters.values(), weight_decay=0.1, decoupled_weight_decay=True)
    assert from_torch(optimizer, parameters)["w"].rule == AdamRule(weight_decay=0.1, decay="decoupled")


class _MySGD(torch.optim.SGD):
    pass


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda p: torch.optim.RMSprop(p), "RMSprop"),
        (lambda p: _MySGD(p, lr=0.1), "_MySGD"),
        (lambda p: torch.optim.SGD(p, lr=0.1, maximize=True), "maximize"),
        (lambda p: torch.optim.AdamW(p, amsgrad=True), "amsgrad"),
    ],
)
def test_unknown_optimizers_and_options_are_refused(make, named):
    parameters = _parameters()
    with pytest.raises(RecordingError, match=named) as caught:
        from_torch(make(parameters.values()), parameters)
    assert "\n" not in str(caught.value)


def test_a_rule_given_by_the_user_opens_any_optimizer():
    parameters = _parameters()
    rules = from_torch(_MySGD(parameters.values(), lr=0.1), parameters, update_rule=SGDRule())
    assert rules["w"].rule == SGDRule()


def test_parameters_must_match_the_optimizer():
    parameters = _parameters()
    with pytest.raises(RecordingError, match="b requires gradients"):
        from_torch(torch.optim.SGD([parameters["w"]], lr=0.1), parameters)
    with pytest.raises(RecordingError, match="1 parameters"):
        from_torch(torch.optim.SGD(parameters.values(), lr=0.1), {"w": parameters["w"]})
    frozen = {"w": parameters["w"], "b": parameters["b"].detach()}
    assert list(from_torch(torch.optim.SGD([frozen["w"]], lr=0.1), frozen)) == ["w"]


def test_state_is_read_before_and_after_the_first_step():
    parameters = _parameters()
    for configuration in (SGD(lr=0.1, momentum=0.9), Adam()):
        optimizer = configuration.build(parameters.values())
        state, step = read_state(configuration.rule, {}, parameters["w"])
        assert step == 0
        assert all(not value.any() for value in state.values())
        for value in parameters.values():
            value.grad = torch.ones_like(value)
        optimizer.step()
        state, step = read_state(configuration.rule, optimizer.state[parameters["w"]], parameters["w"])
        assert step == 1
        for key, value in state.items():
            assert torch.equal(value, optimizer.state[parameters["w"]][key])
            assert value.data_ptr() != optimizer.state[parameters["w"]][key].data_ptr()


def test_state_of_another_optimizer_is_refused():
    with pytest.raises(InputError, match="exp_avg"):
        read_state(AdamRule(), {"step": torch.tensor(3.0), "sum": torch.ones(2)}, torch.ones(2))
    with pytest.raises(InputError, match="pass step="):
        live_direction(AdamRule(), {"exp_avg_sq": torch.ones(2)}, torch.ones(2), lr=0.1)
