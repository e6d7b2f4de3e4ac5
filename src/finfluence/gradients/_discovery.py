"""Finding out, in the first recorded passes, what accounts for every parameter and where the samples lie.

Three things move a parameter from its module to an ancestor's forward-mode derivative: the module's output has no
batch dimension (position embeddings computed once and broadcast), the parameter is used past the module (tied weights
used functionally), or the module does not run at all. What was found stays for the following records.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from finfluence.errors import RecordingError
from finfluence.gradients import _layout as layouts
from finfluence.gradients._capture import ModuleCall, Output
from finfluence.gradients._layout import Layout
from finfluence.gradients._plan import Plan
from finfluence.gradients._probe import sample_gradients, uses_outside
from finfluence.gradients._recording import Recording
from finfluence.gradients._replay import Ambience, tensors_in


class Discovery:
    """What is known of a model's structure beyond its module tree.

    Args:
        plan: changed as things are found.
        parameters: name → recorded parameter.
    """

    def __init__(self, plan: Plan, parameters: Mapping[str, nn.Parameter]) -> None:
        self._plan = plan
        self._names = {id(p): name for name, p in parameters.items()}
        self.settled = False
        self.layouts: dict[tuple[nn.Module, int, int], Layout] = {}

    def lift(self, record: Recording, module: nn.Module, shapes: Sequence[torch.Size]) -> None:
        """Move a module's parameters to the nearest ancestor that is running: its own output holds no samples."""
        ancestor = next((a for a in self._plan.ancestors(module) if record.running(a)), None)
        label, shown = self._plan.label(module), ", ".join(str(tuple(s)) for s in shapes)
        if ancestor is None:
            raise RecordingError(
                f"no dimension of the output {shown} of {label} is the batch of {record.batch_size} samples, nor does "
                "it run inside a module that has one; check the number of ids, pass batch_dim, or use method='jvp'"
            )
        if ancestor in record.completed:
            raise RecordingError(
                f"{self._plan.label(ancestor)} runs {label} on the batch in one call and without it in another "
                f"(output {shown}); use method='jvp'"
            )
        for name in list(self._plan.owned[module].values()):
            self._plan.move(name, ancestor)
            record.pending.discard((module, name))
            record.pending.add((ancestor, name))
        record.changed = True

    def inspect(self, record: Recording, output: Any, inputs: Any, *, batch_dim: int | None) -> None:
        """At the end of the model's forward pass: settle layouts, and move what is used outside its module."""
        try:
            self._inspect(record, output, inputs, batch_dim)
        finally:
            record.forget_graph()

    def _inspect(self, record: Recording, output: Any, inputs: Any, batch_dim: int | None) -> None:
        tensors = [t for t in tensors_in(output) if t.requires_grad]
        record.coincidence |= any(
            layouts.coincides(t.shape, record.batch_size) for t in (*tensors, *tensors_in(inputs))
        )
        if not self.settled:
            for name in sorted(self._leaks(record, tensors)):
                self._escalate(record, name)
        if not record.coincidence and record.batch_size > 1 and record.segments is None:
            for index, t in enumerate(tensors_in(output)):
                options = layouts.candidates(t.shape, record.batch_size, feature_dims=0, batch_dim=batch_dim)
                if options and isinstance(options[0], int):
                    self.layouts.setdefault((self._plan.model, index, t.ndim), options[0])
        if not record.undecided:
            return
        if record.coincidence:
            self._probe(record, tensors, batch_dim)
        else:
            for call, found in record.undecided:
                self._decide(call, found, found.layout)

    def ambience(self, module: nn.Module, entry: Any, inputs: Sequence[Tensor]) -> Ambience:
        """What the generic path needs to run the module again, from the note made when its forward began."""
        if entry is None or entry[0] is None:
            if module.training and any(getattr(m, "p", 0) or getattr(m, "dropout", 0) for m in module.modules()):
                raise RecordingError(
                    f"the layout of the batch inside {self._plan.label(module)} changed after the first step, where "
                    "dropout cannot be replayed; pass batch_dim, or use method='jvp'"
                )
            return Ambience.capture([t.device for t in inputs], rng=False)
        ambience, versions = entry
        if versions != [t._version for t in inputs]:
            raise RecordingError(
                f"{self._plan.label(module)} modifies its input in place, so it cannot be run again on it; "
                "use the out-of-place form of that operation"
            )
        return ambience

    def finish(self, record: Recording) -> None:
        """Check at the end of a record that everything moved was also captured."""
        if record.pending:
            module, name = next(iter(record.pending))
            raise RecordingError(
                f"parameter {name!r} acts before the batch dimension inside {self._plan.label(module)}, whose forward "
                "was not recorded with gradients (re-entrant checkpointing?); use use_reentrant=False or method='jvp'"
            )
        if record.fired and not record.changed:
            self.settled = True

    def apply_deferred(self, record: Recording) -> None:
        """From the next record on, try the nearest ancestor instead of the model for what was found at its end."""
        for name, target in record.deferred.items():
            self._plan.move(name, self._plan.model)
            if target is not self._plan.model:
                del_from = self._plan.owned[self._plan.model]
                for local in [local for local, canonical in del_from.items() if canonical == name]:
                    del del_from[local]
                self._plan.move(name, target)

    def _leaks(self, record: Recording, outputs: Sequence[Tensor]) -> set[str]:
        plan = self._plan
        owners: dict[str, set[nn.Module]] = {}
        for module, names in plan.owned.items():
            for name in names.values():
                owners.setdefault(name, set()).add(module)
        closed = {m for m in plan.owned if all(o is m or o not in plan.owned or not plan.owned[o] for o in m.modules())}
        groups: dict[frozenset[nn.Module], set[str]] = {}
        for name, modules in owners.items():
            if plan.model not in modules:
                groups.setdefault(frozenset(modules - closed), set()).add(name)
        leaks: set[str] = set()
        for opened, names in groups.items():
            through = closed | opened
            reached = uses_outside(
                outputs,
                record.calls,
                lambda c, through=through: c.module in through and bool(plan.owned.get(c.module)),
                self._names,
            )
            leaks |= reached & names
        return leaks

    def _escalate(self, record: Recording, name: str) -> None:
        """The model itself accounts for the parameter in this record, its owners' nearest ancestor in the next."""
        plan = self._plan
        owners = [m for m, names in plan.owned.items() if name in names.values()]
        if plan.model in owners:
            return
        if plan.model in record.completed:
            raise RecordingError(
                f"parameter {name!r} is used differently in two forward passes of one record; record them separately"
            )
        shared = set.intersection(*(set(plan.ancestors(m)) for m in owners))
        record.deferred[name] = next(
            a for a in plan.ancestors(owners[0]) if a in shared and (a in record.completed or a is plan.model)
        )
        plan.move(name, plan.model)
        record.pending.add((plan.model, name))
        record.changed = True

    def _decide(self, call: ModuleCall, output: Output, layout: Layout | None) -> None:
        output.layout, output.decided = layout, True
        if layout is not None:
            self.layouts[call.module, output.index, len(output.shape)] = layout

    def _probe(self, record: Recording, tensors: Sequence[Tensor], batch_dim: int | None) -> None:
        b = record.batch_size
        results = []
        for index, t in enumerate(tensors):
            options = layouts.candidates(t.shape, b, feature_dims=0, batch_dim=batch_dim)
            known = self.layouts.get((self._plan.model, index, t.ndim))
            if known in options:
                results.append((t, known))
            elif options and isinstance(options[0], int):
                results.append((t, options[0]))
        if not results:
            return
        sample = b // 2
        record.probing = True
        try:
            deltas = sample_gradients(results, [o.edge for _, o in record.undecided], b, sample=sample)
        finally:
            record.probing = False
        if deltas is None:
            return
        for (call, output), delta in zip(record.undecided, deltas, strict=True):
            if delta is None or not bool(delta.any()):
                continue
            delta = delta.reshape(output.shape)
            layout: Layout | None = next(
                (o for o in output.options if layouts.confined(delta, b, o, sample=sample)), None
            )
            if layout is not None:
                self._decide(call, output, layout)
                continue
            output.decided = True
            for name in list(self._plan.owned.get(call.module, {}).values()):
                self._escalate(record, name)
