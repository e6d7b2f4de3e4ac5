"""From the gradient at a module's output to what every sample contributes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from finfluence.errors import RecordingError
from finfluence.gradients._capture import ModuleCall, Output, graph_is_kept
from finfluence.gradients._layout import Layout, sum_to_samples
from finfluence.gradients._plan import Plan
from finfluence.gradients._queries import ModuleQueries
from finfluence.gradients._recording import Recording
from finfluence.gradients._replay import Ambience, differences, lacks_forward_mode, tangents
from finfluence.gradients._suspend import suspended
from finfluence.gradients.rules import Call


def contribute(record: Recording, call: ModuleCall, deltas: list[Tensor | None], plan: Plan) -> None:
    """Add a module call's contributions to the recording, given the gradients at its outputs.

    Raises:
        RecordingError: a gradient arrives where no batch dimension is known, an input was modified in place, or the
            module cannot be run again with the same result.
    """
    if record.gradients is not None or record.table.involves(plan.owned[call.module].values()):
        device = next(d.device.type for d in deltas if d is not None)
        if torch.is_grad_enabled() or torch.is_autocast_enabled(device):
            with torch.no_grad(), torch.autocast(device, enabled=False):
                _contribute(record, call, deltas, plan)
        else:
            _contribute(record, call, deltas, plan)
    if not graph_is_kept():
        call.release()


def _contribute(record: Recording, call: ModuleCall, deltas: list[Tensor | None], plan: Plan) -> None:
    names, label = plan.owned[call.module], plan.label(call.module)
    chosen: list[Layout | None] = [
        _layout(record, output, delta, label) for output, delta in zip(call.outputs, deltas, strict=True)
    ]
    kept = call.kept.load(label) if call.kept is not None else None
    rule = plan.rules[call.module]
    if record.gradients is not None and (rule is None or rule.gradients is None):
        raise RecordingError(f"{label} has no closed form for the gradients of single samples")
    if rule is None:
        _generic(record, call, deltas, chosen, kept, names, label)
        return
    assert deltas[0] is not None
    queries = ModuleQueries(record.table, names, plan.name(call.module))
    layout = chosen[0] if chosen[0] is not None else 0
    seen = Call(call.module, kept, deltas[0], layout, record.batch_size, queries, record.sums)
    if record.gradients is None:
        rule.compute(seen)
        return
    assert rule.gradients is not None
    for local, gradient in rule.gradients(seen).items():
        if local in names:
            record.add_gradient(names[local], gradient)


def _layout(record: Recording, output: Output, delta: Tensor | None, label: str) -> Layout | None:
    if delta is None:
        return None
    remedy = "pass batch_dim, or use method='jvp' (for re-entrant checkpointing: use_reentrant=False)"
    if output.layout is None:
        if bool(delta.any()):
            raise RecordingError(
                f"a gradient arrives at an output of {label} of shape {tuple(output.shape)}, in which no dimension is "
                f"the batch of {record.batch_size} samples; {remedy}"
            )
        return None
    # LoRA's A before the first step: its B is zero, so the probe saw no gradient there, and there is none to ascribe.
    if not output.decided and record.coincidence and bool(delta.any()):
        raise RecordingError(
            f"the batch of {record.batch_size} samples cannot be told apart in the output of {label} of shape "
            f"{tuple(output.shape)}; {remedy}"
        )
    return output.layout


def _generic(
    record: Recording,
    call: ModuleCall,
    deltas: list[Tensor | None],
    chosen: Sequence[Layout | None],
    kept: Any,
    names: dict[str, str],
    label: str,
) -> None:
    """Σ over outputs of ⟨δ_i, forward-mode derivative of the module along q⟩_i, one pass a direction."""
    args, kwargs = kept
    ambience = call.ambience or Ambience(None, {}, ())
    for k in range(len(record.table)):
        q = {local: t for local, name in names.items() if (t := record.table.tensor(name, k)) is not None}
        if not q:
            continue
        with suspended():
            primals, images = _derivative(record, call.module, q, args, kwargs, ambience)
        if call.checksum is not None:
            _verify(call, primals, label)
        for output, delta, layout in zip(call.outputs, deltas, chosen, strict=True):
            image = images[output.index]
            if delta is None or image is None or layout is None:
                continue
            dtype = record.sums.dtype
            values = sum_to_samples(image.to(dtype) * delta.to(dtype), record.batch_size, layout)
            record.sums[:, k] += values.to(record.sums.device)


def _derivative(
    record: Recording, module: Any, q: dict[str, Tensor], args: Any, kwargs: Any, ambience: Ambience
) -> Any:
    try:
        return tangents(module, q, args=args, kwargs=kwargs, ambience=ambience)
    except RuntimeError as error:
        if not lacks_forward_mode(error):
            raise
        record.approximate = True
        return differences(module, q, args=args, kwargs=kwargs, ambience=ambience)


def signatures(tensors: Sequence[Tensor]) -> list[Tensor]:
    """(2,) a random projection and the norm of each tensor, to recognise a second run's result."""
    result = []
    for tensor in tensors:
        flat = tensor.detach().reshape(-1).double()
        generator = torch.Generator().manual_seed(0)
        signs = torch.randn(len(flat), generator=generator, dtype=torch.float64).to(flat.device)
        result.append(torch.stack([flat @ signs, flat.norm()]))
    return result


def _verify(call: ModuleCall, primals: list[Tensor], label: str) -> None:
    assert call.checksum is not None
    again = signatures([primals[o.index] for o in call.outputs])
    for output, first, second in zip(call.outputs, call.checksum, again, strict=True):
        tolerance = 10 * torch.finfo(primals[output.index].dtype).eps ** 0.5
        if not bool((first[0] - second[0]).abs() <= tolerance * first[1].clamp(min=1e-30)):
            raise RecordingError(
                f"{label} gives another result when it is run again with the same random state (dropout inside fused "
                "attention, or a random source of its own): set that dropout to 0, or use the math attention kernel"
            )
    call.checksum = None
