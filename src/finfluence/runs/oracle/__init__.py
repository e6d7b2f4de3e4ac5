"""The retraining oracle: influence measured on models that were really trained with and without the samples."""

from finfluence.runs.oracle.executors import Ensemble, Executor, Processes, Ray
from finfluence.runs.oracle.retraining import Retraining, retrain
from finfluence.runs.oracle.sequential import Interim, retrain_until
from finfluence.runs.oracle.truth import Losses, Truth, open_truth

__all__ = [
    "Ensemble",
    "Executor",
    "Interim",
    "Losses",
    "Processes",
    "Ray",
    "Retraining",
    "Truth",
    "open_truth",
    "retrain",
    "retrain_until",
]
