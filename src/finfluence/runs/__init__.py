"""Recording, replaying, reading and retraining: a training run on disk and the ways to make one.

`Recorder` records a loop that the user owns, `train` is the reference loop, `replay` walks a recorded run backwards,
`open_run` reads one, `retrain` is the truth. Names load on first use: reading a run does not import torch.
"""

from typing import TYPE_CHECKING

from finfluence._lazy import lazy_names

if TYPE_CHECKING:
    from finfluence.runs.engine import Engine
    from finfluence.runs.leaving_out import leave_out
    from finfluence.runs.oracle import Retraining, Truth, open_truth, retrain, retrain_until
    from finfluence.runs.panel import NoisePanel
    from finfluence.runs.plan import Plan, Schedule
    from finfluence.runs.pooling import PooledRuns, open_runs, pool
    from finfluence.runs.recorder import Recorder
    from finfluence.runs.replay_plan import ReplayOptions
    from finfluence.runs.replaying import plan_replay, replay
    from finfluence.runs.run import Run, open_run
    from finfluence.runs.sampling import Sampler
    from finfluence.runs.tasks import CausalLMTask, ClassificationTask, Contrast, RegressionTask, Task
    from finfluence.runs.training import train

__getattr__, __dir__, __all__ = lazy_names(  # pyright: ignore[reportUnsupportedDunderAll]
    __name__,
    {
        "finfluence.runs.engine": ("Engine",),
        "finfluence.runs.leaving_out": ("leave_out",),
        "finfluence.runs.oracle": ("Retraining", "Truth", "open_truth", "retrain", "retrain_until"),
        "finfluence.runs.panel": ("NoisePanel",),
        "finfluence.runs.plan": ("Plan", "Schedule"),
        "finfluence.runs.recorder": ("Recorder",),
        "finfluence.runs.replaying": ("plan_replay", "replay"),
        "finfluence.runs.replay_plan": ("ReplayOptions",),
        "finfluence.runs.pooling": ("PooledRuns", "open_runs", "pool"),
        "finfluence.runs.run": ("Run", "open_run"),
        "finfluence.runs.sampling": ("Sampler",),
        "finfluence.runs.tasks": ("CausalLMTask", "ClassificationTask", "Contrast", "RegressionTask", "Task"),
        "finfluence.runs.training": ("train",),
    },
)
