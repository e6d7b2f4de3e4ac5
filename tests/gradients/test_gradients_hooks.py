"""Recording through hooks beyond plain models: dropout, checkpointing, memory, precision, what is refused."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from gradient_cases import (
    CASES,
    Attention,
    Transformer,
    build,
    data,
    error,
    naive,
    random_directions,
    squares,
    trainable,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

from finfluence.errors import RecordingError
from finfluence.gradients import (
    Direction,
    HookedDerivatives,
    per_sample_derivatives,
    query_gradient,
)


def same_graph_naive(losses, model, directions):
    """Per-sample gradients out of one forward pass, so that random masks are shared."""
    parameters = trainable(model)
    rows = []
    for loss in losses:
        g = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True, allow_unused=True)
        rows.append(torch.stack([d.dot(dict(zip(parameters, g, strict=True))) for d in directions]))
    return torch.stack(rows)


IDS = torch.randint(1, 11, (5, 7), generator=torch.Generator().manual_seed(2))
DROPOUT = {
    "transformer": (lambda: Transformer(dropout=0.3), lambda m: squares(m(IDS))),
    "checkpointed transformer": (
        lambda: Transformer(dropout=0.3, checkpointing="non-reentrant"),
        lambda m: squares(m(IDS)),
    ),
    "attention": (lambda: Attention(batch_first=True, dropout=0.4), lambda m: squares(m(data(5, 3, 4)))),
    "encoder layer, sequence first": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.4),
        lambda m: squares(m(data(3, 5, 4)), 1),
    ),
    "dropout around bare parameters": (
        lambda: Transformer(dropout=0.3, functional_head=True),
        lambda m: squares(m(IDS)),
    ),
}


@pytest.mark.parametrize("name", DROPOUT)
def test_active_dropout_is_replayed(name):
    make, losses = DROPOUT[name]
    torch.manual_seed(0)
    model = make().double()
    directions = random_directions(model, 2)
    hooks = HookedDerivatives(model, trainable(model))
    for seed in range(3):
        torch.manual_seed(seed)
        expected = same_graph_naive(losses(model), model, directions)
        torch.manual_seed(seed)
        with hooks.record(directions, 5) as recording:
            losses(model).sum().backward()
        assert error(recording.values, expected) < 1e-9
        torch.manual_seed(seed)
        jvp = per_sample_derivatives(losses, model, parameters=trainable(model), directions=directions, method="jvp")
        assert error(jvp, expected) < 1e-9


class Recompute(torch.autograd.Function):
    """A layer run again in the backward pass, as re-entrant checkpointing does it."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.x, ctx.layer = x.detach(), layer
        return layer(x)

    @staticmethod
    def backward(ctx, *deltas):
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            ctx.layer(x).backward(deltas[0])
        return x.grad, None


@pytest.mark.parametrize("recomputed", [False, True])
def test_backward_leaves_weights_gradients_out_where_it_may(recomputed):
    """A hook on a weight runs when its gradient is computed. A recomputed layer is only met by a whole pass."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            x = torch.tanh(self.first(x))
            return self.third(Recompute.apply(x, self.second) if recomputed else self.second(x))

    model, computed = Model().double(), []
    parameters, directions, x = trainable(model), random_directions(model, 1), data(5, 4)
    expected = per_sample_derivatives(
        lambda m: squares(m.third(m.second(torch.tanh(m.first(x))))),
        model,
        parameters=parameters,
        directions=directions,
        method="finite-difference",
    )
    for p in model.first.parameters():
        p.register_hook(lambda gradient: computed.append(gradient.shape))
    hooks = HookedDerivatives(model, parameters)
    counts = []
    for _ in range(3):
        computed.clear()
        with hooks.record(directions, 5, partial=True) as recording:
            hooks.backward(squares(model(x)).sum())
        assert error(recording.values, expected) < 1e-5
        counts.append(len(computed))
    assert counts == ([2, 2, 2] if recomputed else [2, 0, 0])
    with pytest.raises(RecordingError, match="no recording is running"):
        hooks.backward(torch.zeros(()))


def test_reentrant_checkpointing():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)).double()
    x = data(5, 4)

    def losses(m):
        return squares(m[4](checkpoint(m[1:4], m[0](x), use_reentrant=True)))

    directions = random_directions(model, 1)
    plain = per_sample_derivatives(
        lambda m: squares(m(x)), model, parameters=trainable(model), directions=directions, method="jvp"
    )
    hooks = HookedDerivatives(model, trainable(model))
    with hooks.record(directions, 5) as recording:
        losses(model).sum().backward()
    assert error(recording.values, plain) < 1e-9


def test_positions_behind_reentrant_checkpointing_are_refused_when_sizes_coincide():
    torch.manual_seed(0)
    model = Transformer(checkpointing="reentrant").double()
    hooks = HookedDerivatives(model, trainable(model))
    ids = torch.randint(1, 11, (7, 7))
    with (
        pytest.raises(RecordingError, match="use_reentrant=False"),
        hooks.record(random_directions(model, 1), 7),
    ):
        squares(model(ids)).sum().backward()


@pytest.mark.parametrize("settled", [False, True])
@pytest.mark.parametrize("generic", [False, True])
def test_checkpointing_keeps_its_memory_saving(settled, generic):
    """An activation inside a checkpointed segment dies with the forward pass, recorded or not."""
    alive = []

    class Watch(nn.Module):
        def forward(self, x):
            y = torch.tanh(x)
            alive.append(weakref.ref(y))
            return y

    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return x * self.gain

    last = Scale() if generic else nn.Linear(6, 6)
    model = nn.Sequential(nn.Linear(4, 6), Watch(), last)
    head = nn.Linear(6, 2)
    whole = nn.ModuleList([model, head])
    hooks = HookedDerivatives(whole, trainable(whole), batch_dim=0)
    x = torch.randn(5, 4)
    for _ in range(2 if settled else 1):
        alive.clear()
        with hooks.record(random_directions(whole, 1), 5):
            out = head(checkpoint(model, x, use_reentrant=False))
            gc.collect()
            assert alive[0]() is None
            out.sum().backward()
            gc.collect()
            assert all(ref() is None for ref in alive)


def test_activations_are_released_during_backward():
    """An input is let go when its layer's gradient is done, not at the end of the backward pass."""
    seen, refs = [], []
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    model[1].register_forward_hook(lambda m, a, out: refs.append(weakref.ref(out)))
    hooks = HookedDerivatives(model, trainable(model))
    directions = random_directions(model, 1)
    for _ in range(2):
        refs.clear()
        seen.clear()
        x = torch.randn(5, 4)
        with hooks.record(directions, 5):
            handle = model[0].weight.register_hook(lambda g: seen.append(refs[0]()))
            model(x).sum().backward()
            handle.remove()
        assert seen == [None]


def test_input_modified_in_place_is_refused():
    class Bad(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(4))

        def forward(self, x):
            return x + self.shift

    model = nn.Sequential(Bad())
    hooks = HookedDerivatives(model, trainable(model))
    x = torch.randn(5, 4)

    def step():
        with hooks.record(random_directions(model, 1), 5):
            out = model(x)
            x.add_(1)
            out.sum().backward()

    with pytest.raises(RecordingError, match="modified in place"):
        step()


def test_accumulation_scale_and_retained_graphs():
    case = CASES["linear"]
    model = build(case)
    directions = random_directions(model, 2)
    expected = naive(case, model, directions)
    hooks = HookedDerivatives(model, trainable(model))
    for rows in (torch.tensor([0, 1]), torch.tensor([2, 3, 4])):  # two records into one p.grad
        with hooks.record(directions, len(rows)) as recording:
            (1024.0 * case.losses(model, rows).sum()).backward()
        assert error(recording.values, 1024 * expected[rows]) < 1e-9
    with hooks.record(directions, 5) as recording:
        loss = case.losses(model, torch.arange(5)).sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert error(recording.values, 2 * expected) < 1e-9


def test_batch_size_may_change_after_structure_settled():
    case = CASES["transformer, t equals b"]
    model = build(case)
    directions = random_directions(model, 1)
    expected = naive(case, model, directions)
    hooks = HookedDerivatives(model, trainable(model))
    for rows in (torch.arange(7), torch.tensor([1, 4]), torch.tensor([3]), torch.arange(7)):
        with hooks.record(directions, len(rows)) as recording:
            case.losses(model, rows).sum().backward()
        assert error(recording.values, expected[rows]) < 1e-9


def test_bfloat16_autocast_adds_up_to_the_gradient():
    """Σ_i x_i = ⟨q, g⟩ and each x_i near its float32 value; bfloat16 has 8 bits, so the tolerance is 3 %."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(80, 96), nn.LayerNorm(96), nn.GELU(), nn.Linear(96, 80), nn.Linear(80, 4, bias=False)
    )
    x = torch.randn(16, 80)
    y = torch.randint(0, 4, (16,))
    q = query_gradient(model, trainable(model), lambda m: F.cross_entropy(m(x[:3]), y[:3]))
    exact = per_sample_derivatives(
        lambda m: F.cross_entropy(m(x), y, reduction="none"), model, parameters=trainable(model), directions=[q]
    )
    hooks = HookedDerivatives(model, trainable(model))
    with hooks.record([q], 16) as recording:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(model(x), y, reduction="sum")
        loss.backward()
    assert recording.values.dtype == torch.float32
    assert error(recording.values, exact.double()) < 0.03
    gradients = {n: p.grad for n, p in model.named_parameters()}
    assert float((recording.values.sum() - q.dot(gradients)).abs()) < 0.01 * float(exact.norm())


def test_factored_directions_equal_dense_ones():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(40, 50), nn.ReLU(inplace=True), nn.Linear(50, 60), nn.Tanh(), nn.Linear(60, 3)
    ).double()
    x, query = data(6, 2, 40), data(4, 2, 40, seed=5)
    factored = query_gradient(model, trainable(model), lambda m: squares(m(query)).mean(), factors=True).scaled(-0.3)
    assert set(factored.factors) == {"0", "2"}  # 8 rows; the head's 180 weights are cheaper dense
    assert torch.allclose(factored.factors["2"].dense(), factored.tensors["2.weight"], rtol=1e-12)
    dense = Direction(factored.tensors)
    hooks = HookedDerivatives(model, trainable(model))
    mixed = [factored, *random_directions(model, 1), factored.scaled(2.0), dense]
    with hooks.record(mixed, 6) as recording:
        squares(model(x)).mean().backward()
    values = recording.values
    assert error(values[:, [0]], values[:, [3]]) < 1e-12
    assert error(values[:, [2]], 2 * values[:, [3]]) < 1e-12
    gradients = {n: p.grad for n, p in model.named_parameters()}
    for k, q in enumerate(mixed):
        assert float(values[:, k].sum()) == pytest.approx(float(q.dot(gradients)), rel=1e-9)


def test_directions_changed_in_place_are_noticed():
    case = CASES["linear"]
    model = build(case)
    raw = {name: torch.randn_like(p) for name, p in trainable(model).items()}
    directions = [Direction(raw), Direction({name: t.clone() for name, t in raw.items()})]
    hooks = HookedDerivatives(model, trainable(model))
    results = []
    for _ in range(2):
        with hooks.record(directions, 5) as recording:
            case.losses(model, torch.arange(5)).sum().backward()
        results.append(recording.values)
        for t in raw.values():
            t.mul_(3.0)
    assert torch.allclose(results[1][:, 0], 3 * results[0][:, 0])
    assert torch.allclose(results[1][:, 1], results[0][:, 1])


def test_uncovered_names_parameters_used_outside_of_modules():
    class Loose(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin, self.loose = nn.Linear(4, 2), nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.lin(x)

        def encode(self, x):
            return self.lin(x) * self.loose

    model = Loose()
    hooks = HookedDerivatives(model, trainable(model))
    with hooks.record(random_directions(model, 1), 5):
        model.encode(torch.randn(5, 4)).sum().backward()
    assert hooks.uncovered() == ["loose"]


def test_hooks_are_quiet_outside_of_records_and_during_queries():
    case = CASES["linear"]
    model = build(case)
    directions = random_directions(model, 1)
    hooks = HookedDerivatives(model, trainable(model))
    with hooks.record(directions, 5) as recording:
        case.losses(model, torch.arange(5)).sum().backward()
        before = recording.values.clone()
        query_gradient(model, trainable(model), lambda m: case.losses(m, torch.arange(5)).mean())
    case.losses(model, torch.arange(5)).sum().backward()
    assert torch.equal(recording.values, before)
    hooks.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with pytest.raises(RecordingError, match="removed"), hooks.record(directions, 5):
        pass


def test_in_place_relu_on_a_reshaped_output_stays_with_its_layer():
    """The (b, t, d) output of Linear is a view, whose own hook never fires once it is changed in place."""
    model = nn.Sequential(nn.Linear(4, 7), nn.ReLU(inplace=True), nn.Linear(7, 3)).double()
    hooks = HookedDerivatives(model, trainable(model))
    with hooks.record(random_directions(model, 1), 5):
        squares(model(data(5, 6, 4))).sum().backward()
    assert set(hooks._plan.owned) == {model[0], model[2]}  # else found missing and moved to the costly generic path


class LowRank(nn.Module):
    """LoRA as it starts: B is zero, so A has no gradient at the first step. Rank and batch have the same size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(6, 3).requires_grad_(False)
        self.a = nn.Linear(6, 4, bias=False)
        self.b = nn.Linear(4, 3, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


@pytest.mark.parametrize("started", [True, False])
def test_low_rank_adapters_whose_rank_is_the_batch_size(started):
    model = LowRank().double()
    x = data(4, 5, 6)
    directions = random_directions(model, 2)
    hooks = HookedDerivatives(model, trainable(model))
    for step in range(2):
        expected = same_graph_naive(squares(model(x)), model, directions)
        with hooks.record(directions, 4) as recording:
            squares(model(x)).sum().backward()
        torch.testing.assert_close(recording.values, expected)  # the first step has a direction without signal
        if started and step == 0:
            nn.init.constant_(model.b.weight, 0.1)


@pytest.mark.parametrize("autocast", [True, False])
def test_the_input_of_a_product_without_bias_is_autograds_own(autocast):
    """No copy of the input is kept, nothing outlives a forward pass without backward, and in-place changes are seen."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3, bias=False)).float()
    x = torch.randn(5, 6, 4)
    directions = random_directions(model, 1)
    hooks = HookedDerivatives(model, trainable(model))
    expected = same_graph_naive(squares(model(x)), model, directions)
    for _ in range(2):
        with hooks.record(directions, 5) as recording, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            squares(model(x)).sum().backward()
        assert error(recording.values, expected.double()) < (0.03 if autocast else 1e-5)
    nodes, inputs = [], []

    class Token:
        pass

    def mark(module, args, out):
        token = Token()
        out.grad_fn.next_functions[0][0].metadata["token"] = token
        nodes.append(weakref.ref(token))

    handle = model[1].register_forward_hook(mark)
    out = model(x)
    assert nodes[0]() is not None
    del out
    with pytest.raises(RecordingError, match="both the forward"), hooks.record(directions, 5):
        model(x)
    gc.collect()
    assert [node() for node in nodes] == [None, None]
    handle.remove()
    model[1].register_forward_pre_hook(lambda m, a: inputs.append(a[0]))

    def step():
        with hooks.record(directions, 5):
            loss = squares(model(x)).sum()
            with torch.no_grad():
                inputs[0].add_(1)
            loss.backward()

    with pytest.raises(RecordingError, match=r"input of 1 \(Linear\) was modified in place"):
        step()
