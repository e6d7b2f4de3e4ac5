"""The house's order: nothing imports upward, no file grows beyond a screenful of ideas, statistics need no torch."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import finfluence

ROOT = Path(finfluence.__file__).parent
FLOORS = (
    "tradeoff",
    "influence",
    "signals",
    "gradients",
    "sensitivity",
    "runs",
    "integrations",
    "workflows",
    "cli",
)
FILES = sorted(ROOT.rglob("*.py"))
MAX_LINES = 420
# `run.clean()`, `run.verify()` and `run.report()` are doors to the floor above, which they import when they are called.
DOORS = {"finfluence.runs.run": "finfluence.workflows", "finfluence.runs._facade": "finfluence.workflows"}


def imported(path: Path) -> set[str]:
    """Modules of finfluence that a file imports, at any depth, except in `if TYPE_CHECKING` of an __init__."""
    tree = ast.parse(path.read_text())
    if path.name == "__init__.py":
        tree.body = [
            node
            for node in tree.body
            if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING")
        ]
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: import by the full name"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] == "finfluence"}


def floor_of(module: str) -> int:
    """Height of a module; -1 for what lies below all floors."""
    parts = module.split(".")
    return FLOORS.index(parts[1]) if len(parts) > 1 and parts[1] in FLOORS else -1


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_imports_upward(path: Path) -> None:
    module = ".".join(("finfluence", *path.relative_to(ROOT).with_suffix("").parts))
    own = floor_of(module)
    if own < 0 and path.parent == ROOT and path.name in ("__init__.py", "__main__.py"):
        return
    for name in sorted(imported(path)):
        if module in DOORS and name.startswith(DOORS[module]):
            continue
        assert floor_of(name) <= own, f"{module} imports {name}, which lies above it"
        # the package itself names every floor, so importing from it would hide an upward import
        assert name != "finfluence" or own == len(FLOORS) - 1, f"{module} imports the package instead of a floor"


@pytest.mark.parametrize(("module", "floor"), DOORS.items())
def test_a_door_opens_only_when_it_is_used(module: str, floor: str) -> None:
    code = f"import sys, {module}; assert not [name for name in sys.modules if name.startswith({floor!r})]"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_file_is_too_long(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MAX_LINES


def run_without(forbidden: str, code: str) -> None:
    """Runs code in a fresh process in which one package cannot be imported."""
    blocker = f"""
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == {forbidden!r}:
                raise ModuleNotFoundError(f"No module named {{name!r}}")

    sys.meta_path.insert(0, Blocker())
    """
    script = textwrap.dedent(blocker) + textwrap.dedent(code)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_a_recorded_run_is_analysed_without_torch(tmp_path: Path) -> None:
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(30, 3, generator=generator), torch.randint(0, 2, (30,), generator=generator)
    model = nn.Linear(3, 2)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    finfluence.train(
        finfluence.ClassificationTask(),
        model,
        TensorDataset(x, y),
        queries={"q": (x[:4], y[:4])},
        optimizer=finfluence.SGD(lr=0.1),
        epochs=2,
        batch_size=5,
        directory=tmp_path / "run",
        watch={"few": [1, 2]},
        self_influence="record",
        show_progress="never",
    )
    run_without(
        "torch",
        f"""
        import finfluence as fi
        import finfluence.tradeoff, finfluence.influence, finfluence.signals
        run = fi.open_run({str(tmp_path / "run")!r})
        assert run.influence("q").height == 30
        assert run.influence("q", subsets={{"s": [1, 2, 3]}}).height == 1
        assert run.influence("q", subsets={{"s": [1, 2, 3]}}, estimator="median").height == 1
        assert run.influence("q", subsets=["few"], estimator="max").height == 1
        assert run.influence("self").height == 30
        assert fi.compare([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]).mu > 0
        assert fi.GaussianInfluence(mu=0.5, se=0.1).power(0.05) > 0.05
        assert "torch" not in sys.modules
        """,
    )


def test_importing_the_package_is_quick_and_loads_no_torch() -> None:
    # The promise is half a second on an idle machine. The time of the fastest of five fresh processes is compared with
    # a bound that leaves room for a loaded one.
    code = "import time, sys; t = time.perf_counter(); import finfluence; print(time.perf_counter() - t)"
    code += "; assert not {'torch', 'polars', 'scipy'} & set(sys.modules)"
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(5)
    ]
    assert min(times) < 0.5
