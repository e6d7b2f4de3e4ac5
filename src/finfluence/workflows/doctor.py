"""Is this training recorded correctly, and can it be replayed? Experiments on its first batch, before it is run.

Every check is a small experiment whose size is printed beside the limit it is held to, and what to use instead where it
fails. They work on any recipe; what only language models have (attention kernels) is skipped elsewhere.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from finfluence.errors import FinfluenceError, RecordingError
from finfluence.gradients import Direction, check_model
from finfluence.runs import Engine
from finfluence.runs._identity import tolerance
from finfluence.runs.data import query_batches
from finfluence.runs.engine import isolated_rng, seed_step
from finfluence.sensitivity import EXACT_LIMIT, ExactHessian, Layout, batch_hessian
from finfluence.workflows._examination import (
    Cast,
    flat,
    free_memory,
    gradients_of,
    hooked,
    query_value,
    relative,
    without_autocast,
)
from finfluence.workflows.recipes import Recipe

Verdict = Literal["safe", "caution", "unsafe", "skipped"]
# Relative differences that rounding explains, by the precision of the computation.
_ROUNDING = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}
# Relative errors of a Hessian-vector product: a replay multiplies a run's worth of them.
_PRODUCT_SAFE, _PRODUCT_USABLE = 0.02, 0.2
_NAIVE_SAMPLES = 4


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at.
        verdict: "safe", "caution" (usable, with the advice in mind), "unsafe" or "skipped".
        finding: what was found, with its size.
        advice: what to use instead; empty where all is well.
    """

    name: str
    verdict: Verdict
    finding: str
    advice: str = ""

    def __str__(self) -> str:
        text = f"{self.verdict:<8} {self.name:<20} {self.finding}"
        return f"{text}\n{'':>30}→ {self.advice}" if self.advice else text


def diagnose(recipe: Recipe, *, sensitivity: str = "both", hessian: str = "one-sided") -> Iterator[Check]:
    """Examines a training on its first batch.

    Args:
        recipe: task, model, data, queries and plan.
        sensitivity: what is to be recorded; Hessian-vector products matter to "replay" and "both".
        hessian: how the replay computes them.

    Yields:
        The findings, one after the other; a check that cannot be carried out says why.

    Raises:
        FinfluenceError: the model or the data cannot be loaded.
    """
    model = recipe.make_model(recipe.plan.seed)
    device = next(model.parameters()).device
    try:
        check_model(model)
    except RecordingError as error:
        yield Check("samples are separate", "unsafe", str(error), "nothing else can be examined before that")
        return
    subject = _Subject(recipe, model)
    checks: list[tuple[str, Callable[[], Check]]] = [
        ("queries", subject.queries),
        ("repeated step", subject.determinism),
        ("trainable weights", subject.trainable),
        ("signal identity", subject.identity),
        ("single samples", subject.single_samples),
        ("dtypes", subject.dtypes),
        ("batch composition", subject.composition),
        ("attention kernel", subject.attention),
    ]
    if sensitivity != "live":
        checks.append(("Hessian products", functools.partial(subject.products, hessian)))
    for name, check in checks:
        with isolated_rng(device):
            try:
                yield check()
            except FinfluenceError as error:
                yield Check(name, "unsafe", f"failed: {error}")
            except (RuntimeError, MemoryError) as error:
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                yield Check(name, "skipped", f"could not be examined: {reason}")


class _Subject:
    """A model at the beginning of its training, and one step further."""

    def __init__(self, recipe: Recipe, model: nn.Module) -> None:
        self.recipe, self.plan, self.start = recipe, recipe.plan, model
        self.engine = self._engine(copy.deepcopy(model))
        self.batch = next(self.engine.batches())
        # A fresh adapter's one half is 0, and so is the other half's gradient: one step later both are there.
        with isolated_rng(self.engine.device):
            self.engine.step(self.batch)
        self.rows = self.batch.indices
        autocast = self.plan.precision == "bfloat16-autocast"
        dtypes = {p.dtype for p in model.parameters() if p.dtype.is_floating_point}
        coarsest = max(dtypes, key=lambda d: torch.finfo(d).eps)
        self.precision = "bfloat16" if autocast else str(coarsest).removeprefix("torch.")
        self.limit = max(tolerance(self.engine.parameters), 2e-2 if self.precision in ("bfloat16", "float16") else 0.0)

    def _engine(self, model: nn.Module, task: Any = None) -> Engine:
        recipe = self.recipe
        return Engine(task or recipe.task, model, dataset=recipe.dataset, plan=recipe.plan, collate=recipe.collate)

    def _variant(self, dtype: torch.dtype) -> Engine:
        """The model one step further in another precision, without autocast."""
        model = copy.deepcopy(self.engine.model).to(dtype)
        engine = self._engine(model, Cast(self.recipe.task, dtype))
        engine.plan = without_autocast(engine.plan)
        return engine

    def queries(self) -> Check:
        """Every query has a value and a gradient."""
        engine, found = self.engine, []
        batches = query_batches(self.recipe.queries, collate=self.recipe.collate, device=engine.device)
        for name, batch in batches.items():
            value, gradient = query_value(engine, batch)
            norm = float(
                torch.sqrt(sum((g.double().square().sum() for g in gradient.tensors.values()), torch.zeros(())))
            )
            if norm == 0.0:
                return Check(
                    "queries", "unsafe", f"the gradient of {name!r} is 0", "ask something that the trained weights move"
                )
            found.append(f"{name} = {value:.4g} (gradient {norm:.2g})")
        return Check("queries", "safe", ", ".join(found))

    def determinism(self) -> Check:
        """The same step twice gives the same parameters."""
        again = self._engine(copy.deepcopy(self.start))
        again.step(self.batch)
        difference = relative(flat(again.parameters), flat(self.engine.parameters))
        if difference == 0.0:
            return Check("repeated step", "safe", "bit for bit the same")
        usable = difference <= (1e-3 if self.precision in ("bfloat16", "float16") else 1e-5)
        return Check(
            "repeated step",
            "caution" if usable else "unsafe",
            f"the parameters differ by {difference:.1e}",
            "a replay repeats every step: call torch.use_deterministic_algorithms(True), set model.attention: eager, "
            "keep the number of threads"
            + ("; this size is within the replay's tolerance" if usable else ", or record live signals only"),
        )

    def trainable(self) -> Check:
        """Trainable weights have the precision that small updates need."""
        counts: dict[str, int] = {}
        for p in self.engine.parameters.values():
            kind = str(p.dtype).removeprefix("torch.")
            counts[kind] = counts.get(kind, 0) + p.numel()
        total = sum(p.numel() for p in self.engine.model.parameters())
        text = ", ".join(f"{count:,} in {kind}" for kind, count in counts.items()) + f", of {total:,}"
        low = [kind for kind in counts if kind in ("bfloat16", "float16")]
        if not low:
            return Check("trainable weights", "safe", text)
        return Check(
            "trainable weights",
            "unsafe",
            text,
            f"updates smaller than a rounding step of {low[0]} are lost, and the replay with them: load the model in "
            "float32 (with precision bfloat16-autocast where memory allows), or train a LoRA adapter, which is kept in "
            "float32",
        )

    def identity(self) -> Check:
        """The samples' signals sum to the gradient's."""
        residual = self._residual(self.engine)
        if residual <= self.limit:
            return Check(
                "signal identity", "safe", f"residual {residual:.1e} in {self.precision} (limit {self.limit:.0e})"
            )
        return Check(
            "signal identity",
            "unsafe",
            f"residual {residual:.1e} in {self.precision} (limit {self.limit:.0e})",
            "a parameter is used outside its module, the loss is no sum over samples, or the precision is too low: see "
            "the dtypes below; where float32 is off as well, look at the loss",
        )

    def single_samples(self) -> Check:
        """The signals of single samples equal those by their own gradients, taken one by one."""
        engine, direction = self.engine, self._direction(self.engine)
        values, _ = self._signals(engine, direction)
        naive = []
        for i in range(min(_NAIVE_SAMPLES, len(self.rows))):
            seed_step(self.plan.seed, self.batch.step, device=engine.device)
            loss = engine.losses(engine.model, self.rows)[i]
            naive.append(direction.dot(gradients_of(loss, engine)))
        expected = torch.stack([torch.as_tensor(n).double().cpu() for n in naive])
        got = values[: len(naive)] * len(self.rows)
        error = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
        limit = 3 * self.limit
        return Check(
            "single samples",
            "safe" if error <= limit else "unsafe",
            f"{len(naive)} samples by hooks and by their own backward pass differ by {error:.1e} (limit {limit:.0e})",
            "" if error <= limit else "a layer mixes samples or its batch dimension was mistaken; report the model",
        )

    def dtypes(self) -> Check:
        """The residual of the signal identity in each precision."""
        found = {}
        for name in ("float64", "float32", "bfloat16"):
            size = sum(p.numel() for p in self.engine.model.parameters()) * getattr(torch, name).itemsize
            if 2 * size > free_memory(self.engine.device):
                found[name] = "too large here"
                continue
            try:
                found[name] = f"{self._residual(self._variant(getattr(torch, name))):.1e}"
            except RuntimeError as error:
                found[name] = f"fails ({str(error).splitlines()[0][:60]})"
        text = "residual " + ", ".join(f"{name} {value}" for name, value in found.items())
        return Check("dtypes", "safe", text)

    def composition(self) -> Check:
        """A sample's loss does not depend on its batch mates."""
        engine = self._quiet_engine()
        with torch.no_grad():
            together = engine.losses(engine.model, self.rows).double().cpu()
            alone = torch.cat([engine.losses(engine.model, self.rows[i : i + 1]) for i in range(len(self.rows))])
        difference = float(((together - alone.double().cpu()).abs() / together.abs().clamp(min=1e-3)).max())
        limit = _ROUNDING[self.precision]
        text = f"losses alone and in the batch differ by {difference:.1e} (rounding of {self.precision}: {limit:.0e})"
        if difference <= limit:
            return Check("batch composition", "safe", text)
        return Check(
            "batch composition",
            "unsafe",
            text,
            "padding, batch statistics or packing couples samples: mask padding in the attention, use GroupNorm or "
            "LayerNorm, do not pack several samples into a row",
        )

    def attention(self) -> Check:
        """Fused attention and the plain formula agree."""
        if not hasattr(self.engine.model, "set_attn_implementation"):
            return Check("attention kernel", "skipped", "the model offers no choice of attention kernel")
        results = {}
        for kernel in ("sdpa", "eager"):
            engine = self._quiet_engine()
            engine.model.set_attn_implementation(kernel)  # pyright: ignore[reportCallIssue]
            losses = engine.losses(engine.model, self.rows)
            gradients = gradients_of(losses.mean(), engine)
            results[kernel] = losses.detach().double(), torch.cat([g.flatten() for g in gradients.values()]).double()
        loss = relative(results["sdpa"][0], results["eager"][0])
        gradient = relative(results["sdpa"][1], results["eager"][1])
        limit = 3 * _ROUNDING[self.precision]
        text = f"sdpa against eager: losses differ by {loss:.1e}, gradients by {gradient:.1e} (limit {limit:.0e})"
        if max(loss, gradient) <= limit:
            return Check("attention kernel", "safe", text)
        return Check(
            "attention kernel", "unsafe", text, "set model.attention: eager, or another version of PyTorch for sdpa"
        )

    def products(self, hessian: str) -> Check:
        """Finite-difference Hessian-vector products against the best that there is: exact ones where they fit."""
        layout = Layout.of(self.engine.parameters)
        batches = query_batches(self.recipe.queries, collate=self.recipe.collate, device=self.engine.device)
        gradient = query_value(self.engine, next(iter(batches.values())))[1].tensors
        zeros = {name: torch.zeros_like(p) for name, p in self.engine.parameters.items()}
        direction = layout.flatten(zeros | dict(gradient)).detach()
        reference, kind = self._reference(direction)
        found: dict[str, float] = {}
        for method in dict.fromkeys([hessian if hessian in ("one-sided", "central") else "one-sided", "central"]):
            found[method] = relative(self._difference(self.engine, direction, method).double(), reference)
        own = next(iter(found.values()))
        verdict = "safe" if own <= _PRODUCT_SAFE else "caution" if own <= _PRODUCT_USABLE else "unsafe"
        errors = ", ".join(f"{method} {error:.1e}" for method, error in found.items())
        text = f"relative error against {kind}: {errors} (safe to {_PRODUCT_SAFE:.0e})"
        if verdict == "safe":
            return Check("Hessian products", verdict, text)
        better = "set sensitivity.hessian: central, or " if found.get("central", own) < own / 2 else ""
        coarse = (
            f"{self.precision} is too coarse for differences of gradients: compute in float32 (training.precision and "
            "model.dtype), or "
            if self.precision != "float32"
            else ""
        )
        return Check("Hessian products", verdict, text, f"{coarse}{better}record live signals only")

    def _reference(self, direction: Tensor) -> tuple[Tensor, str]:
        size = sum(p.numel() for p in self.engine.model.parameters())
        if size <= EXACT_LIMIT:
            engine = self._variant(torch.float64)
            layout = Layout.of(engine.parameters)
            theta = layout.flatten({name: p.detach() for name, p in engine.parameters.items()})
            seed_step(self.plan.seed, self.batch.step, device=engine.device)
            made = ExactHessian(
                theta,
                layout,
                lambda _: engine.losses(engine.model, self.rows).mean(),
                leaves=engine.parameters,
            )
            return made.product(direction.double()).double(), "exact products in float64"
        # Parts of many models compute in float32 whatever their weights are: steps are those of float32.
        if 16 * size <= free_memory(self.engine.device):
            engine, kind = self._variant(torch.float64), "central differences in float64"
        else:
            engine, kind = self._variant(torch.float32), "central differences in float32"
        return self._difference(engine, direction, "central", torch.float32).double(), kind

    def _difference(
        self, engine: Engine, direction: Tensor, method: Any, precision: torch.dtype | None = None
    ) -> Tensor:
        layout = Layout.of(engine.parameters)
        theta = {name: p.detach().clone() for name, p in engine.parameters.items()}

        def gradient(parameters: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
            engine.place(parameters)
            seed_step(self.plan.seed, self.batch.step, device=engine.device)
            # a replay takes them without autocast, too
            return gradients_of(engine.losses(engine.model, self.rows, precise=True).mean(), engine)

        try:
            made = batch_hessian(theta, gradient=gradient, method=method, layout=layout, precision=precision)
            return made.product(direction.to(next(iter(theta.values())).dtype))
        finally:
            engine.place(theta)

    def _quiet_engine(self) -> Engine:
        """A copy without dropout, everything else in training mode."""
        model = copy.deepcopy(self.engine.model)
        for module in model.modules():
            if isinstance(module, nn.modules.dropout._DropoutNd):
                module.eval()
        engine = self._engine(model)
        with torch.no_grad():
            first, second = (engine.losses(model, self.rows) for _ in range(2))
        if not torch.equal(first, second):
            model.eval()  # dropout inside fused operations follows its module's mode
        return engine

    def _direction(self, engine: Engine) -> Direction:
        generator = torch.Generator().manual_seed(0)
        return Direction(
            {
                name: torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
                for name, p in engine.parameters.items()
            }
        )

    def _signals(self, engine: Engine, direction: Direction) -> tuple[Tensor, float]:
        """(b,) float64 signals of the batch along a direction, and the same of its gradient."""
        with hooked(engine) as hooks:
            seed_step(self.plan.seed, self.batch.step, device=engine.device)
            with hooks.record([direction], len(self.rows)) as recording:
                gradients = gradients_of(engine.losses(engine.model, self.rows).sum() / len(self.rows), engine)
        return recording.values[:, 0].double().cpu(), float(direction.dot(gradients))

    def _residual(self, engine: Engine) -> float:
        values, expected = self._signals(engine, self._direction(engine))
        scale = max(abs(expected), float(values.abs().sum()))
        return abs(float(values.sum()) - expected) / scale if scale else 0.0


__all__ = ["Check", "Verdict", "diagnose"]
