"""The floor stays light: no torch, no scikit-learn, no scipy.stats until they are used."""

import subprocess
import sys


def test_importing_influence_loads_no_heavy_package():
    code = (
        "import sys, finfluence.influence; "
        "print([m for m in ('torch', 'sklearn', 'finfluence.signals', 'finfluence.runs') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
