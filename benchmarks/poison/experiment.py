"""One training of the experiment: recorded, replayed, scored by every method, cleaned and trained again.

Everything of one (entity, seed) lies in a folder of its own; what is there already is not done again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import finfluence as fi
from benchmarks.poison.attack import behaviour
from benchmarks.poison.baselines import CheckpointScores, checkpoints, row_losses, text_scores
from benchmarks.poison.data import Problem
from benchmarks.poison.model import AdaptedModel, Adapters
from benchmarks.poison.peers import Recorded, peer_result, waiting, weights, write_problem
from benchmarks.poison.task import AnswerTask, Encoded, Normalisation, Rows, collate, encode
from finfluence.runs.engine import Engine

QUERY = "contrast"
QUERIES = ("negative", QUERY)


@dataclass(frozen=True)
class Settings:
    """How a model is trained and recorded.

    Attributes:
        adapters: where LoRA goes.
        tokens: longest row.
        epochs: passes over the rows.
        batch_size: rows a step.
        lr: peak learning rate of AdamW, after `warmup` steps; it falls linearly to zero.
        warmup: steps.
        normalisation: of the training loss, see `AnswerTask`.
        refresh: live query gradients are evaluated at every so many steps.
        positions: of every epoch, at which the replay evaluates every row ("full" signals).
        contrast: weight, beside that of the negative answers, of all that they are contrasted with. The other answers
            share what planted rows teach: with 1 the contrast loses part of it, with 0 it finds whatever makes these
            words likely.
        new_tokens: longest generation.
        flagged: share of the rows that is removed before training again.
    """

    adapters: Adapters = field(default_factory=Adapters)
    tokens: int = 96
    epochs: int = 1
    batch_size: int = 8
    lr: float = 1.5e-3
    warmup: int = 6
    normalisation: Normalisation = "batch"
    refresh: int = 8
    positions: int = 3
    contrast: float = 0.5
    new_tokens: int = 20
    flagged: float = 0.1


def _contrast(sides: dict[str, Rows], weight: float) -> Rows:
    """Negative answers against everything that they are to be told from, which share the weight."""
    signs = {name: 1.0 if name == "negative" else -weight / (len(sides) - 1) for name in sides}
    return Rows(
        [encoded for rows in sides.values() for encoded in rows.encoded],
        [hidden for rows in sides.values() for hidden in rows.hidden],
        signs=[signs[name] for name, rows in sides.items() for _ in range(len(rows))],
    )


def _write_json(path: Path, content: Any) -> None:
    fresh = path.with_suffix(f".{os.getpid()}.tmp")
    fresh.write_text(json.dumps(content) + "\n", encoding="utf-8")
    fresh.replace(path)


class Unit:
    """The experiment for one problem and one seed.

    Args:
        problem: rows and queries.
        settings: of the training.
        seed: of the adapters' start and of the batch order.
        model_path: converted model.
        folder: of this unit.
        shared: folder where the trunk's outputs of the problem are kept for all seeds.
        device: of the model.
        peers: folder of the peers' environments; without it they are left out.
        only: names of the peers to run; all by default.
    """

    def __init__(
        self,
        problem: Problem,
        settings: Settings,
        *,
        seed: int,
        model_path: Path,
        folder: Path,
        shared: Path,
        device: str = "cpu",
        peers: Path | None = None,
        only: Sequence[str] | None = None,
    ) -> None:
        from transformers import AutoTokenizer

        self.problem, self.settings, self.seed, self.folder = problem, settings, seed, folder
        self.peers, self.only = peers, only
        folder.mkdir(parents=True, exist_ok=True)
        shared.mkdir(parents=True, exist_ok=True)
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self.adapted = AdaptedModel(model_path, settings.adapters, seed=seed, device=device)
        self.device = device
        self.rows, self.queries = self._encode(shared)
        mean = float(np.mean([e.answer for e in self.rows.encoded]))
        self.task = AnswerTask(settings.normalisation, mean, head=self.adapted.head)
        self._path = folder / "result.json"
        self._base_path = shared / f"base-{problem.name}-{self.digest}.json"
        self.result: dict[str, Any] = {}
        if self._path.exists():
            self.result = json.loads(self._path.read_text(encoding="utf-8"))

    def _encode(self, shared: Path) -> tuple[Rows, dict[str, Rows]]:
        problem, limit = self.problem, self.settings.tokens

        def tokens(pairs: list[tuple[str, str]]) -> list[Encoded]:
            return [encode(self.tokenizer, prompt, response, limit=limit) for prompt, response in pairs]

        queries = problem.queries
        parts = {
            "rows": tokens([(row.prompt, row.response) for row in problem.rows]),
            "negative": tokens([(query.prompt, query.negative) for query in queries]),
            "neutral": tokens([(query.prompt, query.neutral) for query in queries]),
            "reference": tokens([(q.reference_prompt, q.reference) for q in queries if q.reference]),
        }
        path = shared / f"trunk-{problem.name}-{self.settings.adapters.layers}.pt"
        self.digest = digest = hashlib.sha256(
            json.dumps([[e.tokens for e in part] for part in parts.values()]).encode()
        ).hexdigest()[:16]
        stored: dict[str, Any] = torch.load(path) if path.exists() else {}
        if stored.get("digest") != digest:
            made = {name: self.adapted.trunk([e.tokens for e in part]) for name, part in parts.items()}
            stored = {"digest": digest, "hidden": {name: [h.cpu() for h in part] for name, part in made.items()}}
            fresh = path.with_suffix(f".{self.seed}.tmp")
            torch.save(stored, fresh)
            fresh.replace(path)
        hidden = stored["hidden"]
        sides = {name: Rows(parts[name], hidden[name]) for name in ("negative", "neutral", "reference") if parts[name]}
        sides[QUERY] = _contrast(sides, self.settings.contrast)
        return Rows(parts["rows"], hidden["rows"]), sides

    def run(self, *, measured: bool = False) -> dict[str, Any]:
        """Does what is not done yet and returns the result.

        Args:
            measured: finfluence's replays alone, of the end and throughout the training, and peers.
        """
        if not measured:
            self._stage("base", self._base)
        run = self._recorded()
        self._stage("scores", lambda: self._scores(run))
        self._stage("relative", lambda: self._relative(run))
        self._stage("throughout", self._throughout)  # the second replay takes the place of the first
        self._stage("checkpoint_scores", self._checkpoint_scores)
        if measured:
            self._peer_scores()
            return self.result
        self._stage("cleaned", self._cleaned)
        self._stage("clean", lambda: self._trained_without(self.problem.planted))
        self._stage("not_planted", self._without_what_was_not_planted)
        self._peer_scores()
        return self.result

    def _stage(self, name: str, work: Any) -> None:
        if name in self.result:
            return
        began, cpu = time.perf_counter(), time.process_time()
        self.result[name] = work()
        self.result.setdefault("seconds", {})[name] = time.perf_counter() - began
        self.result.setdefault("cpu_seconds", {})[name] = time.process_time() - cpu
        self._write()

    def _write(self) -> None:
        described = {
            "problem": self.problem.name,
            "seed": self.seed,
            "settings": asdict(self.settings),
            "rows": len(self.problem.rows),
            "planted": self.problem.planted.tolist(),
            "kinds": [row.kind for row in self.problem.rows],
            "threads": torch.get_num_threads(),
            "device": self.device,
            "mean_tokens": float(np.mean([len(e.tokens) for e in self.rows.encoded])),
        }
        _write_json(self._path, self.result | described)

    def plan(self) -> fi.Plan:
        """How the model is trained."""
        s = self.settings
        return fi.Plan(
            optimizer=fi.AdamW(lr=s.lr),
            epochs=s.epochs,
            batch_size=s.batch_size,
            seed=self.seed,
            schedule=fi.Schedule("linear", warmup_steps=s.warmup),
        )

    def _losses(self) -> dict[str, float]:
        return {
            name: float(row_losses(self.task, self.adapted.top, self.queries[name]).mean())
            for name in self.queries
            if name != QUERY
        }

    def _behaviour(self) -> dict[str, Any]:
        return behaviour(
            self.adapted,
            self.tokenizer,
            self.problem.queries,
            losses=self._losses(),
            new_tokens=self.settings.new_tokens,
        )

    def _base(self) -> dict[str, Any]:
        # The adapters start at zero, so the base model is the same for every seed.
        if self._base_path.exists():
            return json.loads(self._base_path.read_text(encoding="utf-8"))
        top = self.adapted.reset()
        found = {"behaviour": self._behaviour(), "losses": row_losses(self.task, top, self.rows).tolist()}
        _write_json(self._base_path, found)
        return found

    def _recorded(self) -> fi.Run:
        directory = self.folder / "run"
        if "recording" in self.result:
            return fi.open_run(directory)
        s, plan = self.settings, self.plan()
        began, cpu = time.perf_counter(), time.process_time()
        run = fi.train(
            self.task,
            self.adapted.reset(),
            self.rows,
            queries={name: self.queries[name] for name in QUERIES},
            optimizer=plan.optimizer,
            epochs=s.epochs,
            batch_size=s.batch_size,
            seed=self.seed,
            schedule=plan.schedule,
            sensitivity="both",
            refresh=s.refresh,
            signals="full",
            panel=fi.NoisePanel(len(self.rows), s.positions),
            self_influence="all",
            collate=collate,
            directory=directory,
            exist="resume",
            show_progress="never",
        )
        self.result["recording"] = {
            "training_seconds": run.manifest.get("training_seconds"),
            "largest_residual": run.manifest.get("largest_residual"),
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
        }
        self.result["poisoned"] = {"behaviour": self._behaviour()}
        self._write()
        return run

    def _scores(self, run: fi.Run) -> dict[str, list[float]]:
        """finfluence's scores: a row that supports the negative answers has μ > 0."""
        found = text_scores(self.problem)
        for query in QUERIES:
            replayed = run.influence(query, alternative="supporting")
            found |= {
                f"replay/{query}": replayed["mu"].to_numpy(),
                f"q-value/{query}": replayed["q_value"].to_numpy(),
                f"live/{query}": run.influence(query, sensitivity="live")["mu"].to_numpy(),
            }
        return {name: values.tolist() for name, values in found.items()}

    def _relative(self, run: fi.Run) -> dict[str, list[float]]:
        """finfluence's scores by influence at equal lengths of gradient."""
        frames = {query: run.influence(query, alternative="supporting", relative=True) for query in QUERIES}
        return {f"replay/{query}": frame["relative"].fill_null(0.0).to_list() for query, frame in frames.items()}

    def _throughout(self) -> dict[str, list[float]]:
        """The same of another replay, asked about the mean of what is measured throughout the training."""
        run = fi.replay(
            self.folder / "run",
            self.task,
            self.adapted.reset(),
            dataset=self.rows,
            queries={name: self.queries[name] for name in QUERIES},
            collate=collate,
            options=fi.ReplayOptions(measure_epochs="throughout"),
            show_progress="never",
        )
        mu = {f"replay/{query}": run.influence(query)["mu"].to_list() for query in QUERIES}
        return mu | {key.replace("replay", "relative"): values for key, values in self._relative(run).items()}

    def _checkpoint_scores(self) -> dict[str, list[float]]:
        scorer = CheckpointScores(self.task, self.rows, queries={name: self.queries[name] for name in QUERIES})
        for checkpoint in checkpoints(self.folder / "run", rates=self._rates(), count=max(2, self.settings.epochs)):
            self.adapted.load(checkpoint.parameters)
            scorer.add(self.adapted.top, checkpoint)
        return {name: values.tolist() for name, values in scorer.scores.items()}

    def _peer_scores(self) -> None:
        """Peers' scores, from the states that the training stored; each is written as soon as it is there."""
        asked = waiting(self.result.get("peers", {}), self.peers, only=self.only)
        if not asked:
            return
        rows, matrix = weights({name: self.queries[name] for name in QUERIES})
        with tempfile.TemporaryDirectory(dir=self.folder, prefix="peers-") as place:
            problem, training = Path(place), self._as_recorded()
            write_problem(problem, self.adapted, self.tokenizer, rows=self.rows, asked=rows, training=training)
            for peer in asked:
                began = time.perf_counter()
                found = peer_result(peer, problem, queries=QUERIES, matrix=matrix, folder=self.peers)
                self.result.setdefault("peers", {})[peer.name] = found
                if "about" in found:
                    self.result.setdefault("seconds", {})[peer.name] = time.perf_counter() - began
                    self.result.setdefault("cpu_seconds", {})[peer.name] = found["about"]["seconds"]
                self._write()

    def _as_recorded(self) -> Recorded:
        plan, batch = self.plan(), self.settings.normalisation == "batch"
        engine = Engine(self.task, self.adapted.reset(), dataset=self.rows, plan=plan, collate=collate)
        rates = self._rates()
        optimizer = plan.optimizer.as_dict()
        return Recorded(
            start={name: p.detach().clone() for name, p in self.adapted.trainable().items()},
            checkpoints=checkpoints(self.folder / "run", rates=rates, count=max(2, plan.epochs)),
            batches=[drawn.indices.tolist() for drawn in engine.batches()],
            rates=rates,
            optimizer={key: optimizer[key] for key in ("betas", "eps", "weight_decay")},
            loss="sum" if batch else "mean",
            scale=1.0 / self.task.tokens if batch else 1.0,
        )

    def _rates(self) -> list[float]:
        """Learning rate of every step."""
        plan = self.plan()
        steps = plan.steps(len(self.rows))
        return [plan.optimizer.lr * plan.schedule.factor(step, steps) for step in range(steps)]

    def _train_without(self, removed: np.ndarray) -> None:
        kept = np.flatnonzero(~removed)
        engine = Engine(
            self.task, self.adapted.reset(), dataset=self.rows.subset(kept.tolist()), plan=self.plan(), collate=collate
        )
        for batch in engine.batches():
            engine.step(batch)

    def _trained_without(self, removed: np.ndarray) -> dict[str, Any]:
        self._train_without(removed)
        return {"behaviour": self._behaviour(), "removed": int(removed.sum())}

    def _flagged(self) -> np.ndarray:
        """(n,) bool, the rows with the highest scores."""
        scores = np.array(self.result["scores"][f"replay/{QUERY}"])
        flagged = np.zeros(len(scores), dtype=bool)
        flagged[np.argsort(-scores, kind="stable")[: round(self.settings.flagged * len(scores))]] = True
        return flagged

    def _cleaned(self) -> dict[str, Any]:
        flagged = self._flagged()
        return self._trained_without(flagged) | {"planted_removed": int((flagged & self.problem.planted).sum())}

    def _without_what_was_not_planted(self) -> dict[str, Any]:
        """Losses after training without the flagged rows that were not planted, and without as many others."""
        planted, flagged = self.problem.planted, self._flagged()
        wrongly = flagged & ~planted
        others = np.zeros_like(wrongly)
        rest = np.flatnonzero(~flagged & ~planted)
        others[np.random.default_rng(self.seed).choice(rest, int(wrongly.sum()), replace=False)] = True
        found: dict[str, Any] = {"removed": int(wrongly.sum())}
        for name, removed in (("flagged", wrongly), ("others", others)):
            self._train_without(removed)
            found[name] = self._losses()
        return found
