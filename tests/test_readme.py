"""The README's snippets are run as they stand, so that what a newcomer copies works."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_snippets_run_in_order(tmp_path: Path) -> None:
    script = tmp_path / "snippets.py"
    # The oracle starts worker processes, which import the main module again.
    body = "\n".join(f"    {line}" if line else "" for line in "\n".join(blocks("python")).splitlines())
    script.write_text(f"def snippets():\n{body}\n\n\nif __name__ == '__main__':\n    snippets()\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "mu" in done.stdout


def test_the_marked_commands_are_the_ones_that_ci_runs() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / ".ci" / "readme_command.py"), "tests"], capture_output=True, text=True, check=True
    )
    assert "pip install -c constraints.txt" in done.stdout
    assert done.stdout.strip().endswith("pytest")


@pytest.mark.parametrize("command", re.findall(r"^finfluence ([\w-]+)", README, re.MULTILINE))
def test_commands_named_in_the_readme_exist(command: str) -> None:
    from finfluence.cli.main import app, register

    register()
    assert command.replace("-", "_") in {c.callback.__name__ for c in app.registered_commands if c.callback}
