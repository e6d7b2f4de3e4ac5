"""On a CUDA GPU: fine-tuning from a configuration, its plan and its examination."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_language_model as tiny
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from finfluence.workflows.configuration import parse_configuration
from finfluence.workflows.doctor import diagnose
from finfluence.workflows.finetuning import fine_tune, prepare
from finfluence.workflows.rehearsal import rehearse

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def content(world: Path, *, device: str, precision: str = "float32") -> dict[str, Any]:
    found = tiny.configuration(world)
    found["training"] |= {"device": device, "precision": precision}
    return found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("world")
    tiny.save_model(directory / "model")
    tiny.write_jsonl(directory / "rows.jsonl", tiny.pairs(24))
    return directory


def test_fine_tuning_agrees_with_the_cpu(world: Path) -> None:
    """A replay by one-sided differences in float32 on both: equal to about a percent of the largest signal."""
    found = {}
    for device in ("cuda", "cpu"):
        work = prepare(parse_configuration(content(world, device=device)))
        run = fine_tune(work, world / device, show_progress="never")
        frame = run.signals(table="signals").sort("step", "sample").select(run.queries).collect()
        found[device] = frame.to_numpy()
    assert np.abs(found["cuda"] - found["cpu"]).max() < 2e-2 * np.abs(found["cpu"]).max()


@pytest.mark.parametrize("precision", ["float32", "bfloat16-autocast"])
def test_the_plan_and_the_examination_see_the_gpu(world: Path, precision: str) -> None:
    work = prepare(parse_configuration(content(world, device="auto", precision=precision)))
    plan = rehearse(work)
    assert plan.device == torch.cuda.get_device_name()
    assert plan.memory_bytes > 0
    verdicts = {check.name: check for check in diagnose(work.recipe, sensitivity="live")}
    unsafe = [str(check) for check in verdicts.values() if check.verdict == "unsafe"]
    assert not unsafe
