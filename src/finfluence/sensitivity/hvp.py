"""Hessian-vector products of a batch's loss: exact, or by finite differences of its gradient."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from math import cbrt, inf, isfinite, sqrt
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from finfluence.errors import InputError, ReplayError
from finfluence.sensitivity.kinks import Kinks
from finfluence.sensitivity.layout import Layout

Parameters = Mapping[str, Tensor]
Loss = Callable[[Parameters], Tensor]
Gradient = Callable[[Parameters], Mapping[str, Tensor]]
HessianMethod = Literal["auto", "exact", "one-sided", "central"]

# `auto` takes the exact product up to this many parameters: below it a double backward costs about what a gradient
# costs and memory is no concern; above it the kept graph of the gradient is (and fused attention kernels have no
# second derivative).
EXACT_LIMIT = 1_000_000


class BatchHessian(ABC):
    """The gradient and the Hessian-vector products of one batch's loss at one point; build it with `batch_hessian`.

    Attributes:
        layout: The order of the flat vectors.
        theta: (size,) the point, flat.
    """

    def __init__(self, theta: Tensor, layout: Layout) -> None:
        self.layout = layout
        self.theta = theta.detach()

    @property
    @abstractmethod
    def gradient(self) -> Tensor:
        """(size,) the gradient of the loss at theta."""

    @abstractmethod
    def product(self, directions: Tensor) -> Tensor:
        """H q for one direction (size,) or several (queries, size), of the same shape."""

    def named_product(self, directions: Parameters) -> dict[str, Tensor]:
        """`product` of named directions, each (*shape) or (queries, *shape)."""
        return self.layout.unflatten(self.product(self.layout.flatten(directions)))


class ExactHessian(BatchHessian):
    """Products by differentiating the gradient (double backward); one kept graph serves all directions.

    Several directions run as one batched backward pass where every operation supports it, and one after the other
    where not. Attention runs with the MATH kernel, because the fused kernels of `scaled_dot_product_attention` have no
    second derivative. `kinks` is the width over which those of piecewise linear activations are spread, see `Kinks`; 0
    leaves them out, as autograd does.

    By default the loss is a function of a flat vector's pieces. With `leaves`, tensors that require gradients and stand
    at theta (a model's own parameters), it is differentiated by them. With `weights`, a vector that requires gradients
    and that the loss is linear in, `products` returns per-sample derivatives too.
    """

    def __init__(
        self,
        theta: Tensor,
        layout: Layout,
        loss: Loss,
        *,
        leaves: Parameters | None = None,
        weights: Tensor | None = None,
        kinks: float = 0.0,
    ) -> None:
        super().__init__(theta, layout)
        self._weights, self._kinks = weights, kinks
        self._named = leaves is not None
        if leaves is None:
            self._leaves = [self.theta.clone().requires_grad_()]
        else:
            self._leaves = [leaves[name] for name in layout.names]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), Kinks(kinks):
            value = loss(layout.unflatten(self._leaves[0]) if leaves is None else leaves)
            if value.numel() != 1:
                raise InputError(
                    f"the loss has shape {tuple(value.shape)}; return a scalar, e.g. the mean over the batch"
                )
            if not value.requires_grad:
                raise InputError(
                    "the loss does not depend on the parameters given to it; compute it from them, e.g. functional_call"
                )
            self._gradients = torch.autograd.grad(
                value.reshape(()), self._leaves, create_graph=True, allow_unused=True, materialize_grads=True
            )
        self._batched = True

    @property
    def gradient(self) -> Tensor:
        """(size,) the gradient of the loss at theta."""
        return self._flat([gradient.detach() for gradient in self._gradients], ())

    def product(self, directions: Tensor) -> Tensor:
        """H q for one direction (size,) or several (queries, size), of the same shape."""
        return self.products(directions)[0]

    def products(self, directions: Tensor) -> tuple[Tensor, Tensor]:
        """H q, and the derivative of the loss along q by each of the weights, of one direction or several.

        ∂⟨∇L, q⟩/∂w_i = ⟨∇ℓ_i, q⟩ for L = Σ_i w_i ℓ_i: the per-sample derivatives come out of the double backward that
        H q needs anyway.

        Args:
            directions: (size,) or (queries, size).

        Returns:
            H q of the same shape, and (..., weights).
        """
        if not any(gradient.requires_grad for gradient in self._gradients):
            count = 0 if self._weights is None else len(self._weights)
            return torch.zeros_like(directions), directions.new_zeros(*directions.shape[:-1], count)
        if directions.ndim == 1:
            return self._pull(directions, batched=False)
        if len(directions) > 1 and self._batched:
            try:
                return self._pull(directions, batched=True)
            except RuntimeError:
                # An operation without a batching rule; a true error shows again in the loop.
                self._batched = False
        pairs = [self._pull(direction, batched=False) for direction in directions]
        return torch.stack([h for h, _ in pairs]), torch.stack([w for _, w in pairs])

    def _pull(self, directions: Tensor, *, batched: bool) -> tuple[Tensor, Tensor]:
        along = list(self.layout.unflatten(directions).values()) if self._named else [directions]
        pairs = [(g, q) for g, q in zip(self._gradients, along, strict=True) if g.requires_grad]
        # checkpointed layers run again here, and must be what they were
        with sdpa_kernel(SDPBackend.MATH), Kinks(self._kinks):
            found = torch.autograd.grad(
                [gradient for gradient, _ in pairs],
                self._leaves if self._weights is None else [*self._leaves, self._weights],
                [q for _, q in pairs],
                retain_graph=True,
                is_grads_batched=batched,
                allow_unused=True,
                materialize_grads=True,
            )
        lead = directions.shape[:-1]
        if self._weights is None:
            return self._flat(found, lead), directions.new_zeros(*lead, 0)
        return self._flat(found[:-1], lead), found[-1].expand(*lead, len(self._weights))

    def _flat(self, tensors: Sequence[Tensor], lead: tuple[int, ...]) -> Tensor:
        if not self._named:
            return tensors[0]
        # The zeros of a parameter that the loss does not use have no leading axis under batching.
        shapes = self.layout.shapes
        return torch.cat([t.expand(*lead, *s).reshape(*lead, -1) for t, s in zip(tensors, shapes, strict=True)], -1)


class DifferenceHessian(BatchHessian):
    """Products by finite differences of the gradient; needs no double backward, so any kernel and any sharding will do.

    One-sided: (∇L(theta + εq) − ∇L(theta)) / ε, one gradient a direction beside the one at theta; central:
    (∇L(theta + εq) − ∇L(theta − εq)) / 2ε, two gradients a direction, exact to second order. The gradient must be the
    same function each time it is called: with dropout, restore the random state inside it.

    With `kinks` the differences are of gradients whose slopes are smooth in place of jumping, see `Kinks`; a gradient
    that is given must be of that kind, too.
    """

    def __init__(
        self,
        theta: Tensor,
        layout: Layout,
        gradient: Gradient,
        *,
        sides: Literal["one-sided", "central"] = "one-sided",
        precision: torch.dtype | None = None,
        kinks: float = 0.0,
        gradients: Gradient | None = None,
        at_theta: Tensor | None = None,
    ) -> None:
        super().__init__(theta, layout)
        self._function, self._functions, self._kinks = gradient, gradients, kinks
        self._sides: Literal["one-sided", "central"] = sides
        self._precision = precision or theta.dtype
        self._norm = float(torch.linalg.vector_norm(self.theta))
        self._at_theta = at_theta

    def _evaluate(self, theta: Tensor) -> Tensor:
        with Kinks(self._kinks, slopes=True):
            return self.layout.flatten(self._function(self.layout.unflatten(theta))).detach()

    @property
    def gradient(self) -> Tensor:
        """(size,) the gradient of the loss at theta; evaluated once, if it was not given."""
        if self._at_theta is None:
            self._at_theta = self._evaluate(self.theta)
        return self._at_theta

    def product(self, directions: Tensor) -> Tensor:
        """H q for one direction (size,) or several (queries, size), of the same shape."""
        directions = directions.detach()
        if directions.ndim == 1:
            return self._difference(directions, _norm(directions))
        if len(directions) == 1:
            return self._difference(directions[0], _norm(directions[0])).unsqueeze(0)
        norms = [_norm(direction) for direction in directions]
        if self._functions is None or not all(norms):
            return torch.stack([self._difference(q, norm) for q, norm in zip(directions, norms, strict=True)])
        epsilon = directions.new_tensor([self._step(norm) for norm in norms])[:, None]
        ahead = self._evaluate_all(self.theta + epsilon * directions)
        if self._sides == "one-sided":
            return (ahead - self.gradient) / epsilon
        return (ahead - self._evaluate_all(self.theta - epsilon * directions)) / (2.0 * epsilon)

    def _evaluate_all(self, thetas: Tensor) -> Tensor:
        assert self._functions is not None
        with Kinks(self._kinks, slopes=True):
            return self.layout.flatten(self._functions(self.layout.unflatten(thetas))).detach()

    def _step(self, norm: float) -> float:
        if not isfinite(norm):
            raise ReplayError(
                f"the direction of a Hessian-vector product has norm {norm}; the adjoint has diverged, raise damping"
            )
        return difference_step(self._norm, norm, precision=self._precision, sides=self._sides)

    def _difference(self, direction: Tensor, norm: float) -> Tensor:
        if norm == 0.0:
            return torch.zeros_like(direction)
        epsilon = self._step(norm)
        ahead = self._evaluate(self.theta.add(direction, alpha=epsilon))
        if self._sides == "one-sided":
            return ahead.sub_(self.gradient).div_(epsilon)
        behind = self._evaluate(self.theta.sub(direction, alpha=epsilon))
        return ahead.sub_(behind).div_(2.0 * epsilon)


def difference_step(
    theta_norm: float,
    direction_norm: float,
    *,
    precision: torch.dtype,
    sides: Literal["one-sided", "central"],
) -> float:
    """The step ε = u^(1/2) · (1 + ‖theta‖)/‖q‖ of a one-sided difference, u^(1/3) · (1 + ‖theta‖)/‖q‖ of a central one.

    u is the machine precision: the powers balance rounding against truncation (Nocedal and Wright, Numerical
    Optimization, 8.1), and the norms make the point move by the same fraction of its own length whatever the scale of
    q.

    Args:
        theta_norm: ‖theta‖.
        direction_norm: ‖q‖ > 0.
        precision: The coarsest dtype in which the gradient is computed.
        sides: `"one-sided"` or `"central"`.

    Returns:
        ε > 0.
    """
    unit = torch.finfo(precision).eps
    return (sqrt(unit) if sides == "one-sided" else cbrt(unit)) * (1.0 + theta_norm) / direction_norm


def batch_hessian(
    parameters: Parameters,
    *,
    loss: Loss | None = None,
    gradient: Gradient | None = None,
    method: HessianMethod = "auto",
    layout: Layout | None = None,
    precision: torch.dtype | None = None,
    model_size: int | None = None,
    kinks: float = 0.0,
    gradients: Gradient | None = None,
    at_theta: Tensor | None = None,
) -> BatchHessian:
    """The gradient and Hessian-vector products of a batch's loss at `parameters`.

    Args:
        parameters: Name → tensor, the point.
        loss: Parameters → scalar loss, differentiable twice by torch; for `"exact"`, and for differences without
            `gradient`.
        gradient: Parameters → gradient by name; for differences. It gets plain tensors and must not change them.
        method: `"exact"`, `"one-sided"`, `"central"`, or `"auto"`: exact when `loss` is given and the model has at most
            `EXACT_LIMIT` = 1,000,000 parameters, one-sided otherwise.
        layout: The order of flat vectors; the mapping's own by default.
        precision: The coarsest dtype in which the gradient is computed, e.g. bfloat16 under autocast; the parameters'
            by default. It sets the step of the differences.
        model_size: Number of all parameters, with the frozen ones (LoRA), for `"auto"`; the trainable ones' number by
            default.
        kinks: Width over which kinks of activations are spread, see `Kinks`; 0 leaves them out.
        gradients: As `gradient` at several points at once, every tensor with a leading axis; for differences along
            several directions.
        at_theta: (size,) the gradient at `parameters`, where it is known; for differences. With `kinks`, one whose
            slopes are smooth.

    Returns:
        The `BatchHessian`.

    Raises:
        InputError: The method is unknown, or the callable that it needs is missing.
    """
    if method not in get_args(HessianMethod):
        raise InputError(f"method is {method!r}; choose one of {list(get_args(HessianMethod))}")
    if loss is None and gradient is None:
        raise InputError("a Hessian-vector product needs loss= or gradient=; got neither")
    layout = layout or Layout.of(parameters)
    theta = layout.flatten(parameters).detach()
    if method == "auto":
        small = (model_size or layout.size) <= EXACT_LIMIT
        method = "exact" if loss is not None and small else "one-sided"
    if method == "exact":
        if loss is None:
            raise InputError("method 'exact' needs loss=, a function of the parameters; or choose 'one-sided'")
        return ExactHessian(theta, layout, loss, kinks=kinks)
    if gradient is None:
        assert loss is not None
        gradient = gradient_of(loss)
    return DifferenceHessian(
        theta,
        layout,
        gradient,
        sides=method,
        precision=precision,
        kinks=kinks,
        gradients=gradients,
        at_theta=at_theta,
    )


def gradient_of(loss: Loss) -> Gradient:
    """Turn a loss of named parameters into its gradient by name (zeros for parameters that it does not use)."""

    def gradient(parameters: Parameters) -> dict[str, Tensor]:
        leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        with torch.enable_grad():
            value = loss(leaves)
        gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
        return dict(zip(leaves, gradients, strict=True))

    return gradient


def _norm(direction: Tensor) -> float:
    """Euclidean norm that neither overflows nor underflows: sensitivities may square below float32's range."""
    norm = float(torch.linalg.vector_norm(direction))
    if 1e6 * sqrt(torch.finfo(direction.dtype).tiny) < norm < inf:
        return norm
    largest = float(direction.abs().max())
    if largest == 0.0 or not isfinite(largest):
        return largest
    return largest * float(torch.linalg.vector_norm(direction / largest))
