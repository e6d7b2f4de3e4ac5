"""Influence from signals: shift over noise, with standard errors, for samples, groups and any subset.

Order of use: `SampleTotals` and a `Noise` of one query, then an `InfluenceTable`, whose frames carry the sign
convention (`frame.finfluence.meta`). No torch.
"""

from finfluence.influence.agreement import Agreement, Ceiling, agreement, ceiling, coverage
from finfluence.influence.consistency import (
    Figure,
    joint_recall,
    mean_over_pairs,
    pairwise_jaccard,
    pairwise_spearman,
    top_sets,
    variation,
)
from finfluence.influence.detection import Detection, detection
from finfluence.influence.finite import finite_estimates
from finfluence.influence.grid import Panel, Positions, ShuffledEpochs
from finfluence.influence.kriging import kriged
from finfluence.influence.metadata import attach, metadata
from finfluence.influence.noise import (
    Noise,
    poisson_noise,
    shuffled_noise,
    spread,
    successive_noise,
    with_replacement_noise,
)
from finfluence.influence.pooling import aligned, pool, pool_estimates
from finfluence.influence.relative import relative_influence, squared_lengths
from finfluence.influence.self_influence import self_influence
from finfluence.influence.shift import (
    Budget,
    DerivativeError,
    Estimates,
    Removal,
    Replacement,
    sample_estimates,
    subset_estimates,
)
from finfluence.influence.subsets import PackedSubsets, SampleIndex, Subsets
from finfluence.influence.table import (
    Alternative,
    Correction,
    Estimator,
    InfluenceTable,
    Reporting,
    null_errors,
    q_values,
    report,
)
from finfluence.influence.totals import Centre, SampleTotals
from finfluence.influence.two_stage import Rule, TwoStage, observations, two_stage, two_stage_subsets
from finfluence.influence.watched import two_stage_samples, watched_frame, watched_observations

__all__ = [
    "Agreement",
    "Alternative",
    "Budget",
    "Ceiling",
    "Centre",
    "Correction",
    "DerivativeError",
    "Detection",
    "Estimates",
    "Estimator",
    "Figure",
    "InfluenceTable",
    "Noise",
    "PackedSubsets",
    "Panel",
    "Positions",
    "Removal",
    "Replacement",
    "Reporting",
    "Rule",
    "SampleIndex",
    "SampleTotals",
    "ShuffledEpochs",
    "Subsets",
    "TwoStage",
    "agreement",
    "aligned",
    "attach",
    "ceiling",
    "coverage",
    "detection",
    "finite_estimates",
    "joint_recall",
    "kriged",
    "mean_over_pairs",
    "metadata",
    "null_errors",
    "observations",
    "pairwise_jaccard",
    "pairwise_spearman",
    "poisson_noise",
    "pool",
    "pool_estimates",
    "q_values",
    "relative_influence",
    "report",
    "sample_estimates",
    "self_influence",
    "shuffled_noise",
    "spread",
    "squared_lengths",
    "subset_estimates",
    "successive_noise",
    "top_sets",
    "two_stage",
    "two_stage_samples",
    "two_stage_subsets",
    "variation",
    "watched_frame",
    "watched_observations",
    "with_replacement_noise",
]
