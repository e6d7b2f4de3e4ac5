"""How well a score finds planted samples."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from finfluence.errors import InputError


@dataclass(frozen=True)
class Detection:
    """Ranking quality of a score against planted truth.

    Attributes:
        auroc: probability that a planted sample scores above another.
        average_precision: mean precision over the ranks of the planted samples.
        prevalence: share planted, which is the average precision of a random score.
    """

    auroc: float
    average_precision: float
    prevalence: float

    def __str__(self) -> str:
        return f"AUROC {self.auroc:.3f}, average precision {self.average_precision:.3f} (chance {self.prevalence:.3f})"


def detection(score: ArrayLike, planted: ArrayLike) -> Detection:
    """Measure how well a score finds planted samples.

    Args:
        score: (n,) higher is more suspect; for harmful samples pass −mu.
        planted: (n,) boolean or 0/1.

    Raises:
        InputError: unequal lengths, non-finite scores, or all or none planted.
    """
    from sklearn.metrics import average_precision_score, roc_auc_score

    scores, truth = np.asarray(score, dtype=np.float64), np.asarray(planted).astype(bool)
    if scores.shape != truth.shape or scores.ndim != 1:
        raise InputError(f"score and planted have shapes {scores.shape} and {truth.shape}; give one of each a sample")
    if not np.isfinite(scores).all():
        raise InputError(f"{int((~np.isfinite(scores)).sum())} scores are not finite; leave those samples out")
    if truth.all() or not truth.any():
        raise InputError(f"{int(truth.sum())} of {len(truth)} samples are planted; detection needs both kinds")
    return Detection(
        float(roc_auc_score(truth, scores)), float(average_precision_score(truth, scores)), float(truth.mean())
    )
