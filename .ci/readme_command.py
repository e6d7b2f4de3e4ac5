"""Prints the README's shell command that follows the marker `<!-- command: NAME -->`."""

import re
import sys
from pathlib import Path

readme = Path(__file__).resolve().parent.parent.joinpath("README.md").read_text(encoding="utf-8")
match = re.search(rf"<!-- command: {re.escape(sys.argv[1])} -->\s*```(?:bash|sh)\n(.*?)```", readme, re.DOTALL)
if match is None:
    sys.exit(f"README.md has no command marked {sys.argv[1]!r}")
print(match.group(1).strip())
