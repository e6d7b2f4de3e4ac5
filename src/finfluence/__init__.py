"""finfluence: which training data made the model behave as it does, with error bars that survive a rerun.

A training run is recorded as signals; everything a user asks is arithmetic on signals. Public names load on first use,
so `import finfluence` is quick and the statistics work where PyTorch is not installed.
"""

from typing import TYPE_CHECKING

from finfluence._lazy import lazy_names

if TYPE_CHECKING:
    from finfluence import (
        cli,
        errors,
        gradients,
        influence,
        integrations,
        runs,
        sensitivity,
        signals,
        tradeoff,
        workflows,
    )
    from finfluence.errors import (
        FinfluenceError,
        FinfluenceWarning,
        InputError,
        OracleError,
        RecordingError,
        ReplayError,
        StoreError,
    )
    from finfluence.runs import (
        CausalLMTask,
        ClassificationTask,
        Contrast,
        NoisePanel,
        Plan,
        PooledRuns,
        Recorder,
        RegressionTask,
        ReplayOptions,
        Run,
        Sampler,
        Schedule,
        Task,
        Truth,
        leave_out,
        open_run,
        open_runs,
        open_truth,
        plan_replay,
        pool,
        replay,
        retrain,
        train,
    )
    from finfluence.sensitivity import SGD, Adam, AdamW
    from finfluence.tradeoff import SIGN_CONVENTION, GaussianInfluence, compare, compose, tradeoff_curve

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_names(  # pyright: ignore[reportUnsupportedDunderAll]
    __name__,
    {
        "finfluence.errors": (
            "FinfluenceError",
            "FinfluenceWarning",
            "InputError",
            "OracleError",
            "RecordingError",
            "ReplayError",
            "StoreError",
        ),
        "finfluence.tradeoff": ("SIGN_CONVENTION", "GaussianInfluence", "compare", "compose", "tradeoff_curve"),
        "finfluence.sensitivity": ("SGD", "Adam", "AdamW"),
        "finfluence.runs": (
            "CausalLMTask",
            "ClassificationTask",
            "Contrast",
            "NoisePanel",
            "Plan",
            "PooledRuns",
            "Recorder",
            "RegressionTask",
            "ReplayOptions",
            "Run",
            "Sampler",
            "Schedule",
            "Task",
            "Truth",
            "leave_out",
            "open_run",
            "open_runs",
            "open_truth",
            "plan_replay",
            "pool",
            "replay",
            "retrain",
            "train",
        ),
    },
    submodules=(
        "cli",
        "errors",
        "gradients",
        "influence",
        "integrations",
        "runs",
        "sensitivity",
        "signals",
        "tradeoff",
        "workflows",
    ),
)
