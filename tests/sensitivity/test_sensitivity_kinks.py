"""Kinks of activations: values and gradients stay, second derivatives are those of the smoothed function."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from finfluence.sensitivity import ExactHessian, Kinks, Layout, has_kinks

SLOPES = torch.tensor([0.1, 0.3], dtype=torch.float64)
ACTIVATIONS = {
    "relu": torch.relu,
    "functional": functional.relu,
    "method": torch.Tensor.relu,
    "overwriting": lambda x: functional.relu(x.clone(), inplace=True),
    "overwriting method": lambda x: x.clone().relu_(),
    "overwriting, by name": lambda x: functional.relu(input=x.clone(), inplace=True),
    "leaky": lambda x: functional.leaky_relu(x, 0.2),
    "leaky, overwriting": nn.LeakyReLU(0.2, inplace=True),
    "relu6": lambda x: functional.relu6(4 * x),
    "hardtanh": lambda x: functional.hardtanh(x, -0.5, 1.5),
    "prelu": lambda x: functional.prelu(x, SLOPES),
}


def _points() -> torch.Tensor:
    return torch.randn(50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _derivatives(function, x):
    """Value, first and second derivative at every point; the function works on each by itself."""
    x = x.clone().requires_grad_()
    y = function(x + 0)
    (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    second = torch.zeros_like(x)
    if slope.requires_grad:
        (second,) = torch.autograd.grad(slope.sum(), x, materialize_grads=True)
    return y.detach(), slope.detach(), second


def _smoothed(function, x, width):
    """∂²/∂x² of E f(x + h z), z standard normal, by quadrature and differences; h = width · sd of what goes in."""
    nodes = torch.linspace(-8, 8, 16001, dtype=torch.float64)
    weights = torch.exp(-0.5 * nodes**2)
    weights /= weights.sum()
    h = width * x.std(correction=0)

    def mean(at):
        inputs = at[None] + h * nodes[:, None, None]
        return (weights[:, None, None] * function(inputs.reshape(-1, 2)).view(inputs.shape)).sum(0)

    step = 1e-2
    return (mean(x + step) - 2 * mean(x) + mean(x - step)) / step**2


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_second_derivatives_are_those_of_the_smoothed_function(name):
    function, x = ACTIVATIONS[name], _points()
    plain, slope, none = _derivatives(function, x)
    assert not none.any()
    with Kinks(0.2) as kinks:
        value, same, second = _derivatives(function, x)
    assert kinks.found == 1
    assert torch.equal(value, plain)
    assert torch.equal(same, slope)
    expected = _smoothed(function, x, 0.2)
    assert expected.abs().max() > 0.5
    torch.testing.assert_close(second, expected, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", ["relu", "leaky", "hardtanh", "prelu"])
def test_smooth_slopes_are_those_of_the_smoothed_function(name):
    function, x = ACTIVATIONS[name], _points()
    with Kinks(0.2, slopes=True):
        value, slope, _ = _derivatives(function, x)
        _, ahead, _ = _derivatives(lambda y: function(y), x)
    assert torch.equal(value, function(x))
    assert torch.equal(slope, ahead)
    nodes = torch.linspace(-8, 8, 16001, dtype=torch.float64)
    weights = torch.exp(-0.5 * nodes**2)
    weights /= weights.sum()
    inputs = x[None] + 0.2 * x.std(correction=0) * nodes[:, None, None]
    _, slopes, _ = _derivatives(function, inputs.reshape(-1, 2))
    expected = (weights[:, None, None] * slopes.view(inputs.shape)).sum(0)
    torch.testing.assert_close(slope, expected, rtol=1e-3, atol=1e-3)


POOLS = {
    "two dimensions": (nn.MaxPool2d(2), (3, 2, 6, 6)),
    "overlapping, padded": (nn.MaxPool2d(3, stride=2, padding=1), (3, 2, 7, 7)),
    "dilated, unbatched": (nn.MaxPool2d((2, 3), stride=(2, 1), dilation=(1, 2)), (2, 6, 8)),
    "one dimension": (nn.MaxPool1d(3, stride=2, padding=1), (3, 2, 9)),
    "by name": (lambda x: functional.max_pool2d(input=x, kernel_size=2, stride=1), (3, 2, 5, 5)),
}


@pytest.mark.parametrize("name", POOLS)
def test_a_maximum_has_its_kink_where_two_are_equal(name):
    """Values and gradients are pooling's own; the curvature is that of the second largest value overtaking."""
    pool, shape = POOLS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    weights = None
    found = []
    for width in (0.0, 0.3):
        with Kinks(width) as kinks:
            y = pool(x)
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
            (slope,) = torch.autograd.grad((weights * y).sum(), x, create_graph=True)
        assert kinks.found == 1
        found.append((y, slope))
    (plain, slope), (value, same) = found
    assert torch.equal(plain, value)
    assert torch.equal(slope, same)
    # by hand: every window's two largest values and where they are
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    (product,) = torch.autograd.grad((same * direction).sum(), x)
    index = torch.arange(x.numel(), dtype=torch.float64).reshape(shape)
    windows = _windows(pool, x.detach(), index)
    ahead = torch.tensor([a - b for a, _, b, _ in windows], dtype=torch.float64)
    width = 0.3 * ahead.square().mean().sqrt()
    density = torch.exp(-0.5 * (ahead / width) ** 2) / (np.sqrt(2 * np.pi) * width)
    expected, flat = torch.zeros(x.numel(), dtype=torch.float64), direction.reshape(-1)
    for (_, i, _, j), w, d in zip(windows, weights.reshape(-1), density, strict=True):
        moved = w * d * (flat[i] - flat[j])
        expected[i] += moved
        expected[j] -= moved
    torch.testing.assert_close(product.reshape(-1), expected)


def _windows(pool, x, index):
    """(largest, its place, second, its place) of every window, by pooling again without what was the largest."""
    found = []
    pooled = pool(x)
    for place in np.ndindex(*pooled.shape):
        inside = []
        rest = x.clone()
        for _ in range(2):
            leaf = rest.clone().requires_grad_()
            out = pool(leaf)[place]
            (mask,) = torch.autograd.grad(out, leaf)
            where = int(index[mask != 0])
            inside += [float(out.detach()), where]
            rest.view(-1)[where] = -1e9
        found.append(tuple(inside))
    return found


def test_smooth_slopes_of_pooling_are_shared_by_the_two_largest():
    """Where two are equal each has half; every window's slopes add up to 1."""
    x = torch.tensor([[[1.0, 1.0, 0.0, 3.0]]], requires_grad=True)
    with Kinks(0.5, slopes=True):
        (slope,) = torch.autograd.grad(functional.max_pool1d(x, 2).sum(), x)
    width = 0.5 * np.sqrt((0 + 9) / 2)
    share = float(torch.special.ndtr(torch.tensor(3.0 / width)))
    torch.testing.assert_close(slope, torch.tensor([[[0.5, 0.5, 1 - share, share]]]))


def test_pooling_that_is_left_alone():
    x = torch.randn(1, 1, 5, 5, requires_grad=True)
    for pool in (nn.MaxPool2d(2, ceil_mode=True), nn.MaxPool2d(1)):
        with Kinks(0.3) as kinks:
            (slope,) = torch.autograd.grad(pool(x).square().sum(), x, create_graph=True)
        assert kinks.found == 1
        assert torch.equal(slope, torch.autograd.grad(pool(x).square().sum(), x)[0])


def test_models_with_kinks_are_known_by_their_modules():
    assert has_kinks(nn.Sequential(nn.Linear(2, 2), nn.ReLU6()))
    assert has_kinks(nn.Sequential(nn.Tanh(), nn.MaxPool2d(2)))
    assert not has_kinks(nn.Sequential(nn.Linear(2, 2), nn.GELU(), nn.Softplus()))


def test_overwritten_inputs_are_overwritten():
    """A module that relies on what it overwrites gets it."""
    x = _points().requires_grad_()
    with Kinks(0.2):
        y = x * 2
        functional.relu(y, inplace=True)
        (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), x)
    assert torch.equal(y, torch.relu(2 * x))
    assert torch.equal(slope, 2.0 * (x > 0))
    assert second.any()


def test_what_has_no_gradient_or_no_kink_is_left_alone():
    x = _points()
    with Kinks(0.2) as kinks, torch.no_grad():
        assert torch.equal(torch.relu(x), x.clamp(min=0))
        assert torch.relu(torch.tensor([-1, 2])).tolist() == [0, 2]
        torch.tanh(x)
    assert kinks.found == 2
    with Kinks(0.2):
        empty = torch.relu(torch.zeros(0, 3, requires_grad=True))
        constant = torch.zeros(4, requires_grad=True)
        (slope,) = torch.autograd.grad(torch.relu(constant).sum(), constant, create_graph=True)
        (second,) = torch.autograd.grad(slope.sum(), constant)
    assert empty.shape == (0, 3)
    assert not slope.any()
    assert not second.any()
    with Kinks(0.2, slopes=True):
        (slope,) = torch.autograd.grad(torch.relu(constant).sum(), constant)
    assert not slope.any()
    with Kinks(0.0) as kinks:
        _, _, second = _derivatives(torch.relu, x)
    assert kinks.found == 1
    assert not second.any()


def test_infinite_inputs_leave_no_mark():
    """Rows masked by −∞ before they are pooled."""
    x = torch.randn(2, 3, 8)
    x[:, :, 5:] = -torch.inf
    x.requires_grad_()
    for function in (torch.relu, lambda y: functional.max_pool1d(y, 2)):
        (expected,) = torch.autograd.grad(function(x).clamp(min=-9).sum(), x)
        for slopes in (False, True):
            with Kinks(0.2, slopes=slopes):
                y = function(x).clamp(min=-9)
                (slope,) = torch.autograd.grad(y.sum(), x, create_graph=True)
            assert torch.equal(y, function(x).clamp(min=-9))
            assert torch.equal(slope, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_derivatives_of_every_mode():
    """Forward mode, function transforms and maps over rows see the same curvature as two backward passes."""
    inputs = torch.linspace(-1, 1, 30, dtype=torch.float64)

    def f(w):
        return torch.relu(w + inputs).sum()

    w = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    with Kinks(0.2):
        (slope,) = torch.autograd.grad(f(w), w, create_graph=True)
        (second,) = torch.autograd.grad(slope, w)
        found = torch.func.hessian(f)(w.detach())
        mapped = torch.func.vmap(torch.func.grad(torch.func.grad(f)))(w.detach().repeat(2))
    assert second > 1
    torch.testing.assert_close(found, second)
    torch.testing.assert_close(mapped, second.repeat(2))


class _Network(nn.Module):
    def __init__(self, *, recomputed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.LeakyReLU(0.1), nn.Linear(8, 1))
        self.recomputed = recomputed

    def forward(self, x):
        return checkpoint(self.layers, x, use_reentrant=False) if self.recomputed else self.layers(x)


def test_products_of_a_network_by_every_way_are_the_same():
    """Several directions at once, one by one, and through layers that are recomputed."""
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 1, dtype=torch.float64)
    found = []
    for recomputed in (False, True):
        model = _Network(recomputed=recomputed).double()
        leaves = dict(model.named_parameters())
        layout = Layout.of(leaves)
        theta = layout.flatten({name: p.detach() for name, p in leaves.items()})
        directions = torch.randn(3, layout.size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

        def loss(_, model=model):
            return functional.mse_loss(model(x), y)

        exact = ExactHessian(theta, layout, loss, leaves=leaves, kinks=0.25)
        together = exact.product(directions)
        torch.testing.assert_close(torch.stack([exact.product(q) for q in directions]), together)
        sharp = ExactHessian(theta, layout, loss, leaves=leaves)
        assert torch.equal(sharp.gradient, exact.gradient)
        assert (sharp.product(directions) - together).norm() > 0.02 * together.norm()
        # a Hessian is symmetric
        np.testing.assert_allclose(directions @ together.mT, (directions @ together.mT).mT, rtol=1e-9)
        found.append(together)
    torch.testing.assert_close(found[0], found[1])


def test_the_hessian_is_that_of_the_mean_gradient_over_shifted_inputs():
    """One layer whose inputs to ReLU vary by h: the mean over them of the gradient has the smoothed Hessian."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    w = torch.randn(4, generator=generator, dtype=torch.float64)
    q = torch.randn(4, generator=generator, dtype=torch.float64)
    layout = Layout.of({"w": w})

    def loss(values):
        return torch.relu(x @ values["w"]).mean()

    product = ExactHessian(w, layout, loss, kinks=0.3).product(q)
    shifts = 0.3 * (x @ w).std(correction=0) * torch.randn(200_000, generator=generator, dtype=torch.float64)

    def mean_gradient(at):
        on = torch.stack([(a > -shifts).double().mean() for a in x @ at])
        return (on[:, None] * x).mean(0)

    step = 0.02
    expected = (mean_gradient(w + step * q) - mean_gradient(w - step * q)) / (2 * step)
    torch.testing.assert_close(product, expected, rtol=0.05, atol=0.02)
