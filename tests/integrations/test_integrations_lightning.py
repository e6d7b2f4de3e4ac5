"""A recorded Lightning training is the bare one bit for bit, with the same samples however their ids are learnt."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import finfluence as fi
from finfluence.errors import FinfluenceError, InputError
from finfluence.integrations.lightning import InfluenceCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:GPU available but not used.*"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval.*"),
]
N = 14
generator = torch.Generator().manual_seed(0)
X, Y = torch.randn(N, 5, generator=generator), torch.randint(0, 3, (N,), generator=generator)


def loader(*, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(X, Y, torch.arange(N)), batch_size=batch_size, shuffle=True)


class Module(lightning.LightningModule):
    def __init__(self, *, kind: str = "adamw", dropout: float = 0.2, own_loader: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))
        self.kind, self.own_loader = kind, own_loader

    def training_step(self, batch: Any, index: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        if self.kind == "adamw":
            return torch.optim.AdamW(self.parameters(), lr=0.05)
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return loader() if self.own_loader else None


def query(module: Any) -> Tensor:
    return functional.cross_entropy(module.net(X[:5]), Y[:5])


def fit(module: Module, callbacks: list[Any], folder: Path, **options: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=callbacks,
        **options,
    )
    trainer.fit(module, None if module.own_loader else loader())
    return torch.cat([p.detach().flatten() for p in module.parameters()]), torch.get_rng_state()


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.05}, {"precision": "bf16-mixed"}]
)
def test_training_is_that_without_the_callback(tmp_path: Path, options: dict[str, Any]) -> None:
    bare = fit(Module(), [], tmp_path, **options)
    module = Module()
    recorded = fit(module, [InfluenceCallback({"q": query}, tmp_path / "run", refresh=2)], tmp_path, **options)
    assert torch.equal(bare[0], recorded[0])
    assert torch.equal(bare[1], recorded[1])
    assert not [m for m in module.modules() if m._forward_pre_hooks or m._forward_hooks]
    steps = fi.open_run(tmp_path / "run").steps()
    assert steps["residual"].max() < (2e-2 if "precision" in options else 1e-5)  # pyright: ignore[reportOperatorIssue]
    assert (steps["scale"] < 0.99).any() == ("gradient_clip_val" in options)
    accumulated = "accumulate_grad_batches" in options
    assert steps["batch_size"].to_list() == ([8, 6] * 2 if accumulated else [4, 4, 4, 2] * 2)
    assert steps["epoch"].to_list() == ([0, 0, 1, 1] if accumulated else [0] * 4 + [1] * 4)


def test_ids_are_the_same_from_batches_and_from_the_loader(tmp_path: Path) -> None:
    frames: list[pl.DataFrame] = []
    ways: list[tuple[bool, Callable[[Any], Any] | None]] = [
        (False, None),
        (True, None),
        (False, lambda batch: batch[2]),
    ]
    for i, (own, id_fn) in enumerate(ways):
        callback = InfluenceCallback({"q": query}, tmp_path / f"run-{i}", id_fn=id_fn)
        fit(Module(own_loader=own), [callback], tmp_path)
        frames.append(fi.open_run(tmp_path / f"run-{i}").signals().collect())
    assert frames[0].equals(frames[1])
    assert frames[0].equals(frames[2])
    assert sorted(frames[0]["sample"].to_list()) == sorted(list(range(N)) * 2)


def test_signals_equal_a_loop_over_samples(tmp_path: Path) -> None:
    # the first step of SGD: x_i = −lr · ⟨∇m, ∇ℓ_i⟩ / b
    callback = InfluenceCallback({"q": query}, tmp_path / "run")
    fit(Module(kind="sgd", dropout=0.0), [callback], tmp_path, max_steps=1)
    frame = fi.open_run(tmp_path / "run").signals().collect()
    module = Module(dropout=0.0)

    def gradient(loss: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))])

    direction = gradient(query(module))
    expected = [
        -0.1 * float(direction @ gradient(functional.cross_entropy(module.net(X[i : i + 1]), Y[i : i + 1]))) / 4
        for i in frame["sample"]
    ]
    np.testing.assert_allclose(frame["q"].to_numpy(), expected, rtol=1e-4, atol=1e-8)


class Manual(Module):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Skips(Module):
    def training_step(self, batch: Any, index: int) -> Any:
        return super().training_step(batch, index) if index == 0 else None


@pytest.mark.filterwarnings("ignore:.*training_step.*returned.*None.*")
@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (Manual, {}, "manual optimisation"),
        (Skips, {}, "had no backward pass"),
        (Module, {"ids": [1, 2]}, "2 entries for a training set of 14 rows"),
    ],
)
def test_what_cannot_be_recorded_is_refused(
    tmp_path: Path, module: type[Module], options: dict[str, Any], message: str
) -> None:
    made = module()
    with pytest.raises(FinfluenceError, match=message) as caught:
        fit(made, [InfluenceCallback({"q": query}, tmp_path / "run", **options)], tmp_path)
    assert "\n" not in str(caught.value)
    assert not [m for m in made.modules() if m._forward_pre_hooks or m._forward_hooks]


def test_queries_and_ids_are_checked_when_given(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="queries must map names"):
        InfluenceCallback({"q": 3}, tmp_path / "run")  # type: ignore[dict-item]
    with pytest.raises(InputError, match="give one of them"):
        InfluenceCallback({"q": query}, tmp_path / "run", ids=[1], id_fn=lambda batch: batch[2])


@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 3, "gradient_clip_val": 0.05}, {"precision": "bf16-mixed"}]
)
def test_a_training_kept_for_a_replay_is_taken_again(tmp_path: Path, options: dict[str, Any]) -> None:
    bare = fit(Module(), [], tmp_path, **options)
    module = Module()
    samples = pl.DataFrame({"sample": list(range(N))[::-1], "label": Y.tolist()[::-1]})
    callback = InfluenceCallback({"q": query}, tmp_path / "run", sensitivity="both", samples=samples)
    recorded = fit(module, [callback], tmp_path, **options)
    assert torch.equal(bare[0], recorded[0])
    assert torch.equal(bare[1], recorded[1])
    run = callback.replay(module, Labelled(), show_progress="never")
    assert run.manifest["replay"]["largest_mismatch"] < (1e-3 if "precision" in options else 1e-6)
    assert torch.equal(torch.cat([p.detach().flatten() for p in module.parameters()]), recorded[0])
    assert run.samples()["sample"].to_list() == list(range(N))
    assert run.influence("q")["mu"].is_finite().all()
    left = callback.leave_out(module, Labelled(), groups="label", show_progress="never")
    with torch.no_grad():
        measured = float(query(module.eval()))
    assert left["measured_with"].to_list() == pytest.approx([measured] * left.height, rel=1e-2)
    assert (left["measured_without"] - left["measured_with"]).abs().min() > 1e-6
    assert torch.equal(torch.cat([p.detach().flatten() for p in module.parameters()]), recorded[0])
    # a new process has followed no loader
    fresh = InfluenceCallback({"q": query}, tmp_path / "run")
    with pytest.raises(InputError, match="followed no loader"):
        fresh.replay(Module(), Labelled())
    assert fresh.replay(Module(), Labelled(), dataset=loader().dataset).influence("q").equals(run.influence("q"))


class Labelled(fi.ClassificationTask):
    """Batches hold the samples' indices, too."""

    def losses(self, model: Any, batch: Any) -> Tensor:
        return super().losses(model, batch[:2])


def test_clipping_by_value_cannot_be_replayed(tmp_path: Path) -> None:
    callback = InfluenceCallback({"q": query}, tmp_path / "run", sensitivity="both")
    with pytest.raises(InputError, match="clipped by value cannot be replayed"):
        fit(Module(), [callback], tmp_path, gradient_clip_val=0.1, gradient_clip_algorithm="value")
