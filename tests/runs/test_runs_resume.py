"""A training that is killed at any moment goes on to what the uninterrupted one would have given."""

import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs_killed
import torch
from runs_killed import CASES, run_case
from runs_problems import N, data, model, parameters, record
from safetensors.torch import load_file

import finfluence as fi
from finfluence.errors import FinfluenceWarning, StoreError

TABLES = ("signals", "live", "panel", "self")


def assert_same(first: fi.Run, second: fi.Run, tables: tuple[str, ...] = TABLES) -> None:
    assert first.steps().equals(second.steps())
    for table in tables:
        frames = [run.store.signals(table).sort("step", maintain_order=True).collect() for run in (first, second)]  # pyright: ignore[reportArgumentType]
        assert frames[0].equals(frames[1]), table
    watched = [run.store.watch().sort("step", "subset", "arm").collect() for run in (first, second)]
    assert watched[0].equals(watched[1])


def final_state(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(sorted((directory / "states").iterdir())[-1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("whole")
    for case in CASES:
        run_case(folder / case, case)
    return {case: folder / case for case in CASES}


class Processes:
    """Training processes, forked from one that has imported everything and computed nothing."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, runs_killed.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, directory: Path, case: str, *, writes: int = 0) -> int:
        """Trains until it ends, or is killed when it has written so many files (0: never); returns its exit code."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(f"{directory}\t{case}\t{writes}\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def close(self) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    server = Processes()
    yield server
    server.close()


@pytest.mark.parametrize("case", list(CASES))
def test_kills_at_random_moments(tmp_path: Path, whole: dict[str, Path], processes: Processes, case: str) -> None:
    # Seed 7 draws the files after whose writing each process kills itself with SIGKILL, in the midst of training or
    # replay. A right implementation never fails.
    draws = random.Random(7)
    directory, kills = tmp_path / "run", 0
    while processes.run(directory, case, writes=draws.randrange(1, 40) if kills < 5 else 0) == -signal.SIGKILL:
        kills += 1
        assert kills <= 5
    assert kills >= 2
    assert_same(fi.open_run(directory), fi.open_run(whole[case]))
    first, second = final_state(directory), final_state(whole[case])
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert fi.open_run(directory).manifest["largest_residual"] == fi.open_run(whole[case]).manifest["largest_residual"]


def test_a_process_killed_from_outside(tmp_path: Path, whole: dict[str, Path]) -> None:
    process = subprocess.Popen([sys.executable, runs_killed.__file__, str(tmp_path / "run"), "live"])
    deadline = time.monotonic() + 60
    while len(list((tmp_path / "run").glob("steps/*.parquet"))) < 2:
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FinfluenceWarning)
        partial = fi.open_run(tmp_path / "run")
    assert 0 < partial.steps().height <= fi.open_run(whole["live"]).steps().height
    run_case(tmp_path / "run", "live", exist="resume")
    assert_same(fi.open_run(tmp_path / "run"), fi.open_run(whole["live"]))


def test_a_failed_run_is_resumed_from_its_last_state(tmp_path: Path) -> None:
    class Broken(torch.utils.data.Dataset):
        def __init__(self, at: int) -> None:
            self.left, self.base = at, data()

        def __len__(self) -> int:
            return N

        def __getitem__(self, index: int) -> Any:
            self.left -= 1
            if self.left == 0:
                raise OSError("the disk of the data set went away")
            return self.base[index]

    with pytest.raises(OSError, match="went away"):
        record(tmp_path / "run", dataset=Broken(120))
    failed = fi.open_run(tmp_path / "run")
    assert failed.store.status == "failed"
    assert 1 < failed.steps().height < 18
    assert failed.influence("first")["mu"].is_finite().any()
    resumed, plain = model(), model()
    run = record(tmp_path / "run", resumed, exist="resume")
    assert_same(run, record(tmp_path / "plain", plain))
    assert torch.equal(parameters(resumed), parameters(plain))


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, whole: dict[str, Path]) -> None:
    for case, directory in whole.items():
        before = {path: path.read_bytes() for path in directory.rglob("*.parquet")}
        state = final_state(directory)
        final = run_case(directory, case, exist="resume")
        assert torch.equal(final, torch.cat([state[f"parameter/{k}"].flatten() for k, _ in model().named_parameters()]))
        assert {path: path.read_bytes() for path in directory.rglob("*.parquet")} == before


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"seed": 1}, "plan"),
        ({"batch_size": 7}, "plan"),
        ({"refresh": 2}, "refresh"),
        ({"self_influence": "record"}, "self_influence"),
        ({"sensitivity": "both"}, "sensitivity"),
        ({"panel": fi.NoisePanel(0)}, "panel"),
        ({"queries": {"first": data(3)}}, "queries"),
    ],
    ids=["seed", "batch size", "refresh", "self-influence", "sensitivity", "panel", "queries"],
)
def test_another_plan_does_not_continue_a_run(tmp_path: Path, changes: Any, field: str) -> None:
    record(tmp_path / "run", epochs=1)
    before = (tmp_path / "run/run.json").read_bytes()
    with pytest.raises(StoreError, match=f"was started with {field} .*; resume it with the same"):
        record(tmp_path / "run", **({"epochs": 1, "exist": "resume"} | changes))
    if field != "queries":
        assert (tmp_path / "run/run.json").read_bytes() == before


def test_live_runs_keep_one_state_and_replays_all(whole: dict[str, Path]) -> None:
    assert len(list((whole["live"] / "states").iterdir())) == 1
    assert len(list((whole["live"] / "auxiliary-0").iterdir())) == 1
    interval = fi.open_run(whole["both"]).manifest["checkpoint_every"]
    assert len(list((whole["both"] / "states").iterdir())) == int(np.ceil(36 / interval)) + 1
