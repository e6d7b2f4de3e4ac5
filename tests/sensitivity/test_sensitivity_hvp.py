"""Hessian-vector products against dense Hessians. Protects: the only second-order term of a replay."""

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from finfluence.errors import InputError, ReplayError
from finfluence.sensitivity import (
    EXACT_LIMIT,
    DifferenceHessian,
    ExactHessian,
    Layout,
    batch_hessian,
    difference_step,
    gradient_of,
)


class _Attention(nn.Module):
    """One self-attention block with layer normalisation, on (batch, tokens, 6)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.LayerNorm(6), nn.Linear(6, 18), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(self.norm(x)).unflatten(-1, (3, 2, 3)).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out((x + mixed.transpose(1, 2).flatten(-2)).mean(1))


def _conv() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(36, 3)
    )


CASES = {
    "tanh": (lambda: nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)), (5,)),
    "relu": (lambda: nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)), (5,)),
    "conv": (_conv, (1, 6, 6)),
    "attention": (_Attention, (4, 6)),
}


def _problem(kind: str, dtype: torch.dtype = torch.float64, seed: int = 0):
    """Parameters, loss, two directions and the dense products (float64, at the same parameters)."""
    make, shape = CASES[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().to(dtype)
        x, y = torch.randn(7, *shape).to(dtype), torch.randint(0, 3, (7,))
        parameters = {name: value.detach() for name, value in model.named_parameters()}
        size = sum(value.numel() for value in parameters.values())
        directions = torch.randn(2, size).to(dtype)

    def loss(values, x=x):
        return nn.functional.cross_entropy(functional_call(model, dict(values), (x,)), y)

    return parameters, loss, directions, x


def _dense(parameters, loss, x) -> Tensor:
    """The Hessian, row by row, by differentiating each element of the gradient, in float64 and with the MATH kernel."""
    leaves = [value.double().requires_grad_() for value in parameters.values()]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value = loss(dict(zip(parameters, leaves, strict=True)), x.double())
        gradient = torch.cat([g.flatten() for g in torch.autograd.grad(value, leaves, create_graph=True)])
    rows = []
    for element in gradient:
        row = torch.autograd.grad(element, leaves, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([r.flatten() for r in row]))
    return torch.stack(rows)


def _error(product: Tensor, expected: Tensor) -> float:
    return float(((product.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


# Relative errors allowed in the product's norm. One-sided: truncation and rounding both of order u^(1/2) times the
# ratio of curvatures; central: u^(2/3). ReLU's gradient has kinks, at which a difference sees what the exact product
# does not; at this seed none lies within a float64 step, and float32 is not asked of it.
@pytest.mark.parametrize("kind", list(CASES))
@pytest.mark.parametrize(("method", "tolerance"), [("exact", 1e-9), ("one-sided", 1e-5), ("central", 1e-7)])
def test_float64_products_equal_the_dense_hessian(kind, method, tolerance):
    parameters, loss, directions, x = _problem(kind)
    hessian = batch_hessian(parameters, loss=loss, method=method)
    expected = directions @ _dense(parameters, loss, x)
    assert _error(hessian.product(directions), expected) < tolerance
    assert _error(hessian.product(directions[0]), expected[0]) < tolerance
    torch.testing.assert_close(
        hessian.gradient, hessian.layout.flatten(gradient_of(loss)(parameters)), rtol=1e-10, atol=1e-12
    )
    named = hessian.named_product(hessian.layout.unflatten(directions))
    assert all(named[name].shape == (2, *value.shape) for name, value in parameters.items())
    assert _error(hessian.layout.flatten(named), expected) < tolerance


@pytest.mark.parametrize("kind", ["tanh", "conv", "attention"])
@pytest.mark.parametrize(("method", "tolerance"), [("exact", 1e-4), ("one-sided", 2e-2), ("central", 5e-3)])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_float32_products_at_any_scale_of_the_direction(kind, method, tolerance, scale):
    parameters, loss, directions, x = _problem(kind, torch.float32)
    expected = directions.double() @ _dense(parameters, loss, x)
    product = batch_hessian(parameters, loss=loss, method=method).product(directions * scale)
    assert _error(product.double() / scale, expected) < tolerance


@pytest.mark.parametrize("method", ["exact", "one-sided", "central"])
def test_zero_directions_cost_nothing_and_give_zero(method):
    parameters, loss, directions, _ = _problem("tanh")
    directions[0] = 0.0
    product = batch_hessian(parameters, loss=loss, method=method).product(directions)
    assert not product[0].any()
    assert product[1].any()


def test_tiny_float32_directions_do_not_underflow():
    """Elements of 1e-30, whose squares are below float32's range: not mistaken for zero."""
    parameters, loss, directions, x = _problem("tanh", torch.float32)
    product = batch_hessian(parameters, loss=loss, method="one-sided").product(directions * 1e-30)
    assert _error(product.double() / 1e-30, directions.double() @ _dense(parameters, loss, x)) < 2e-2


def test_a_diverged_direction_is_an_error():
    parameters, loss, directions, _ = _problem("tanh")
    directions[0, 0] = float("inf")
    with pytest.raises(ReplayError, match="inf"):
        batch_hessian(parameters, loss=loss, method="central").product(directions)


def test_operations_without_a_batching_rule_fall_back_to_a_loop():
    class Cube(torch.autograd.Function):
        """A function that vmap cannot batch (no vmap rule and none generated)."""

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, *grads):
            (x,) = ctx.saved_tensors
            return grads[0] * Square.apply(x)

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return 3 * x**2

        @staticmethod
        def backward(ctx, *grads):
            (x,) = ctx.saved_tensors
            if torch._C._functorch.is_batchedtensor(grads[0]):
                raise RuntimeError("no batching rule")
            return grads[0] * 6 * x

    theta = {"w": torch.tensor([1.0, -2.0], dtype=torch.float64)}
    hessian = batch_hessian(theta, loss=lambda p: Cube.apply(p["w"]).sum(), method="exact")
    directions = torch.tensor([[1.0, 1.0], [0.0, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(hessian.product(directions), directions * torch.tensor([6.0, -12.0]))


def test_linear_and_partly_used_losses():
    parameters = {"used": torch.ones(2, dtype=torch.float64), "unused": torch.ones(3, dtype=torch.float64)}
    linear = batch_hessian(parameters, loss=lambda p: p["used"].sum(), method="exact")
    assert torch.equal(linear.gradient, torch.tensor([1.0, 1.0, 0, 0, 0], dtype=torch.float64))
    assert not linear.product(torch.ones(2, 5, dtype=torch.float64)).any()
    for method in ("exact", "central"):
        square = batch_hessian(parameters, loss=lambda p: (p["used"] ** 2).sum(), method=method)
        product = square.product(torch.ones(5, dtype=torch.float64))
        torch.testing.assert_close(product, torch.tensor([2.0, 2, 0, 0, 0], dtype=torch.float64))


def test_one_sided_shares_the_gradient_at_theta():
    parameters, loss, directions, _ = _problem("tanh")
    calls = []

    def gradient(values):
        calls.append(1)
        return gradient_of(loss)(values)

    hessian = batch_hessian(parameters, gradient=gradient, method="one-sided")
    hessian.product(directions)
    _ = hessian.gradient
    assert len(calls) == 3


def test_automatic_choice():
    parameters, loss, _, _ = _problem("tanh")
    assert isinstance(batch_hessian(parameters, loss=loss), ExactHessian)
    assert isinstance(batch_hessian(parameters, gradient=gradient_of(loss)), DifferenceHessian)
    assert isinstance(batch_hessian(parameters, loss=loss, model_size=EXACT_LIMIT + 1), DifferenceHessian)


def test_difference_step_follows_precision_and_norms():
    step = difference_step(9.0, 2.0, precision=torch.float32, sides="one-sided")
    assert step == pytest.approx(2.0**-11.5 * 5.0)
    assert difference_step(9.0, 2.0, precision=torch.float64, sides="central") == pytest.approx(2.0 ** (-52 / 3) * 5.0)
    coarse = difference_step(9.0, 2.0, precision=torch.bfloat16, sides="one-sided")
    assert coarse == pytest.approx(2.0**-3.5 * 5.0)


def test_missing_or_wrong_callables_are_named():
    parameters, loss, _, _ = _problem("tanh")
    with pytest.raises(InputError, match="loss= or gradient="):
        batch_hessian(parameters)
    with pytest.raises(InputError, match="needs loss="):
        batch_hessian(parameters, gradient=gradient_of(loss), method="exact")
    with pytest.raises(InputError, match="'newton'"):
        batch_hessian(parameters, loss=loss, method="newton")  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match=r"shape \(8, 5\)"):
        batch_hessian(parameters, loss=lambda p: p["0.weight"], method="exact")
    with pytest.raises(InputError, match="does not depend"):
        batch_hessian(parameters, loss=lambda p: torch.ones(()), method="exact")


def test_per_sample_derivatives_come_out_of_the_same_double_backward():
    """Against a loop: by the weights of L = Σ w_i ℓ_i, with a model's own parameters as leaves, one of them unused."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    leaves = dict(model.named_parameters()) | {"unused": torch.zeros(2, dtype=torch.float64, requires_grad=True)}
    layout = Layout.of(leaves)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 1, 0, 1])
    weights = torch.full((5,), 0.2, dtype=torch.float64, requires_grad=True)

    def losses():
        return torch.nn.functional.cross_entropy(model(x), y, reduction="none")

    theta = layout.flatten({name: p.detach() for name, p in leaves.items()})
    exact = ExactHessian(theta, layout, lambda _: (losses() * weights).sum(), leaves=leaves, weights=weights)
    directions = torch.randn(4, layout.size, dtype=torch.float64)
    products, derivatives = exact.products(directions)
    rows = [
        torch.autograd.grad(own, list(leaves.values()), retain_graph=True, materialize_grads=True) for own in losses()
    ]
    flat = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    torch.testing.assert_close(derivatives, directions @ flat.mT)
    torch.testing.assert_close(exact.gradient, flat.mean(0))
    for direction, product, own in zip(directions, products, derivatives, strict=True):
        alone, same = exact.products(direction)
        torch.testing.assert_close(alone, product)
        torch.testing.assert_close(same, own)
    assert not products[:, -2:].any()
    plain = ExactHessian(
        theta[:-2],
        Layout.of(dict(model.named_parameters())),
        lambda p: torch.nn.functional.cross_entropy(torch.func.functional_call(model, dict(p), (x,)), y),
    )
    torch.testing.assert_close(products[:, :-2], plain.product(directions[:, :-2]))


@pytest.mark.parametrize("method", ["exact", "one-sided", "central"])
def test_kinks_that_are_spread_have_a_curvature(method):
    """Kinks of weight 1/k spread evenly over [−1, 1] have the curvature 1/2; autograd sees none of it."""
    kinks = torch.linspace(-1, 1, 4001, dtype=torch.float64)
    parameters = {"w": torch.full((1,), 0.1, dtype=torch.float64)}

    def loss(values):
        return torch.relu(values["w"] - kinks).mean()

    direction = torch.tensor([3e-9], dtype=torch.float64)
    assert batch_hessian(parameters, loss=loss, method="exact").product(direction) == 0
    smoothed = batch_hessian(parameters, loss=loss, method=method, kinks=0.1).product(direction)
    torch.testing.assert_close(smoothed, direction / 2, rtol=1e-3, atol=0.0)


@pytest.mark.parametrize("sides", ["one-sided", "central"])
def test_several_points_at_once_give_what_each_gives_alone(sides):
    parameters, loss, directions, _ = _problem("relu")
    gradient, calls = gradient_of(loss), []

    def gradients(values):
        calls.append(len(next(iter(values.values()))))
        rows = [gradient({name: value[k] for name, value in values.items()}) for k in range(calls[-1])]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    alone = batch_hessian(parameters, gradient=gradient, method=sides, kinks=0.2)
    together = batch_hessian(parameters, gradient=gradient, gradients=gradients, method=sides, kinks=0.2)
    torch.testing.assert_close(together.product(directions), alone.product(directions), rtol=1e-10, atol=0.0)
    assert calls == [2] * (1 if sides == "one-sided" else 2)
    directions[1] = 0
    torch.testing.assert_close(together.product(directions), alone.product(directions), rtol=1e-10, atol=0.0)
