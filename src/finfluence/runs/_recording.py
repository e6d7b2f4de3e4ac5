"""What run.json and the stored states say of a training that is to be replayed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import torch
from torch import Tensor, nn

from finfluence.errors import InputError, ReplayError
from finfluence.runs._trajectory import kept_vectors
from finfluence.runs.data import Collate, dataset_size
from finfluence.runs.engine import Engine
from finfluence.runs.loop_engine import LoopEngine
from finfluence.runs.loop_record import build_optimizer
from finfluence.runs.panel import NoisePanel, full_panel
from finfluence.runs.plan import Plan
from finfluence.runs.replay_plan import ReplayOptions, ReplayPlan
from finfluence.runs.states import StateStore
from finfluence.runs.tasks import Task
from finfluence.sensitivity import FlatUpdate, ParameterRule, UpdateRule, from_torch
from finfluence.signals import Folder, SignalStore

_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
_LOW_PRECISION_TOLERANCE = 1e-3


class Recording:
    """The recorded training.

    Args:
        folder: the run directory.
        manifest: the entries of its run.json.

    Raises:
        ReplayError: it was not recorded for a replay, or has not finished.
    """

    def __init__(self, folder: Folder, manifest: Mapping[str, Any]) -> None:
        if "plan" not in manifest or manifest.get("sensitivity") not in ("replay", "both"):
            raise ReplayError(
                f"{folder.display} was not recorded for a replay; record it with "
                "sensitivity='replay' (finfluence.train, or Recorder and the callbacks for a loop of your own)"
                if manifest.get("sensitivity") not in ("replay", "both")
                else f"the loop of {folder.display} has not finished; a replay starts from its end"
            )
        self.folder = folder
        self.manifest = manifest
        self.plan = Plan.from_dict(manifest["plan"])
        self.n = int(manifest["n_samples"])
        self.loop: dict[str, Any] | None = manifest.get("loop")  # of somebody else's, taken as it was
        self.steps = self.plan.steps(self.n) if self.loop is None else int(manifest["total_steps"])
        self.queries: list[str] = list(manifest["queries"])
        sizes = manifest["panel"]
        full = manifest["signals"] == "full"
        panel = full_panel(self.n, sizes["positions"]) if full else NoisePanel(**sizes)
        self.panel = panel if panel.samples else None
        self.states = StateStore(folder)
        self.cuts = self.states.steps()
        if not self.cuts or self.cuts[-1] != self.steps or self.cuts[0] != 0:
            raise ReplayError(
                f"{folder.display} has states up to step {self.cuts[-1] if self.cuts else 'none'} of {self.steps}; "
                "finish the training first (train with exist='resume')"
            )

    def check_data(self, dataset: Any, queries: Mapping[str, Any]) -> None:
        """Refuses data and queries that are not those of the recording.

        Raises:
            InputError: another number of samples, or other queries.
        """
        if dataset_size(dataset) != self.n:
            raise InputError(
                f"the run was recorded on {self.n} samples, the dataset has {dataset_size(dataset)}; "
                "give the dataset of the recording"
            )
        if list(queries) != self.queries:
            raise InputError(f"the run was recorded for the queries {self.queries}, got {list(queries)}")

    def apart(self, parameters: Mapping[str, Tensor], step: int) -> float:
        """Distance of trainable parameters from those stored before a step, over the norm of the stored ones."""
        stored = self.states.load(step)
        pairs = [(stored[f"parameter/{name}"].to(p), p.detach()) for name, p in parameters.items()]
        norms = [[float(torch.linalg.vector_norm(part)) for part in (then, now - then)] for then, now in pairs]
        return math.hypot(*(n for _, n in norms)) / max(math.hypot(*(n for n, _ in norms)), 1e-30)

    def tolerance(self, dtype: torch.dtype) -> float:
        """How far re-executed parameters may be from the stored ones."""
        low = self.plan.precision == "bfloat16-autocast"
        return _LOW_PRECISION_TOLERANCE if low else _TOLERANCE.get(dtype, _LOW_PRECISION_TOLERANCE)

    def rules(self, parameters: Mapping[str, nn.Parameter]) -> UpdateRule | Mapping[str, ParameterRule]:
        """The optimizer's update rule, or each parameter's."""
        if self.loop is None:
            return self.plan.optimizer.rule
        return from_torch(build_optimizer(self.loop, parameters), parameters)

    def engine(self, task: Task, model: nn.Module, *, dataset: Any, collate: Collate | None) -> Engine:
        """What takes the recorded steps again."""
        if self.loop is None:
            return Engine(task, model, dataset=dataset, plan=self.plan, collate=collate)
        return LoopEngine(
            task,
            model,
            dataset=dataset,
            folder=self.folder,
            manifest=self.manifest,
            cuts=self.cuts,
            collate=collate,
        )

    def estimate(self, update: FlatUpdate, model: nn.Module, options: ReplayOptions) -> ReplayPlan:
        """What the replay will need."""
        plan, evaluations = self.plan, 0
        if self.panel is not None:
            positions = min(self.panel.positions, plan.sampler.steps_per_epoch(self.n, plan.batch_size))
            evaluations = min(self.panel.samples, self.n) * positions * plan.epochs
        clip_exactly = plan.clip_norm is not None and options.clip_derivative == "exact"
        itemsize = next(p.dtype.itemsize for p in model.parameters() if p.requires_grad)
        return ReplayPlan.estimate(
            options,
            cuts=self.cuts,
            queries=len(self.queries),
            batch_size=plan.batch_size,
            panel_evaluations=evaluations,
            vectors=kept_vectors(update, clip_exactly=clip_exactly),
            vector_bytes=update.layout.size * itemsize,
            hessian=options.method(model),
            training_seconds=self.manifest.get("training_seconds"),
        )

    def sample_names(self) -> pl.Series:
        """The id of each of the dataset's rows."""
        return SignalStore.open(self.folder.display, partial=True).samples().select("sample").collect()["sample"]

    def losses(self, steps: Sequence[int]) -> dict[int, float | None]:
        """Recorded mean losses by step; none of a loop that was somebody else's, who may mean another mean."""
        if self.loop is not None:
            return {}
        table = SignalStore.open(self.folder.display, partial=True).steps()
        frame = table.filter(pl.col("step").is_in(list(steps))).select("step", "loss").collect()
        return dict(zip(frame["step"].to_list(), frame["loss"].to_list(), strict=True))
