"""Training processes that die: forked by a server that has imported everything, killed by their own hand."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from runs_problems import model, parameters, record

import finfluence as fi
from finfluence.signals import _files

CASES: dict[str, dict[str, Any]] = {
    "live": {
        "refresh": 2,
        "watch": {"few": [1, 2, 3, 8], "more": list(range(20, 30))},
        "auxiliary": "train",
        "self_influence": "record",
    },
    "both": {"sensitivity": "both", "optimizer": fi.AdamW(lr=0.02), "clip_norm": 0.5, "accumulation": 2},
}


def run_case(directory: Path, case: str, **changes: Any) -> torch.Tensor:
    """Records six epochs with dropout; returns the final parameters."""
    net = model(1, dropout=0.2)
    record(directory, net, epochs=6, **(CASES[case] | changes))
    return parameters(net)


def killed_after(writes: int, directory: Path, case: str) -> None:
    """Resumes the training, and dies by SIGKILL as soon as it has written so many files."""
    os.fsync = lambda _: None  # a killed process loses nothing that the kernel has
    original, count = _files.LocalFolder.write, 0

    def write(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal count
        result = original(self, *arguments, **named)
        count += 1
        if count == writes:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    _files.LocalFolder.write = write
    run_case(directory, case, exist="resume")


def serve() -> None:
    """Forks one process for each line of standard input and reports how it ended."""
    for line in sys.stdin:
        directory, case, writes = line.rstrip("\n").split("\t")
        pid = os.fork()
        if pid == 0:
            try:
                killed_after(int(writes), Path(directory), case)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        run_case(Path(sys.argv[1]), sys.argv[2], exist="resume")
    else:
        serve()
