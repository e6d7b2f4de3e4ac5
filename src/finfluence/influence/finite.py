"""μ of a finite removal: what training along the recorded path without a subset did, made right for its placement."""

from dataclasses import replace

import numpy as np

from finfluence.errors import InputError
from finfluence.influence._arrays import Floats
from finfluence.influence.shift import DerivativeError, Estimates, Removal, subset_estimates
from finfluence.influence.subsets import PackedSubsets
from finfluence.influence.table import InfluenceTable
from finfluence.influence.totals import SampleTotals


def finite_estimates(
    table: InfluenceTable,
    batch: SampleTotals,
    *,
    packed: PackedSubsets,
    change: Floats,
    sensitivity: Floats,
    error: DerivativeError,
) -> Estimates:
    """Estimate μ of subsets from one training without each, on the recorded batches less the subset.

    The change of the measurement holds everything that first order leaves out, and what the recorded path owes to the
    places in which it happened to put the subset. The latter is known to first order, the difference between the
    shift that the batches show and the completed one, and is exchanged (a control variate):

        μ_S = (change_S − Δ_S of the batches + Δ_S completed) / σ_S

    σ_S is the pooled noise of training with and without S. The noise of the parameters is taken as the same in both, so
    that the measurement's goes like its gradient. The error is that of the completed shift, another path's (as a
    multiple of the error of placement), and `error.joint` of μ, mostly for the unit.

    Args:
        table: of the run and the query, with its noise.
        batch: totals of the signals that batches had, with `table`'s samples.
        packed: k subsets of the table's samples.
        change: (k,) measurement without each subset less that with all samples, on the recorded path.
        sensitivity: (k,) norm of the measurement's gradient without each subset over that with all samples.
        error: path and joint, see `DerivativeError`.

    Raises:
        InputError: the table has no noise.
    """
    if table.noise is None:
        raise InputError("a finite removal is measured in units of the run's noise; the table has none")
    removal, noise = Removal(table.budget, table.replacement), table.noise
    along = DerivativeError(path=error.path)
    completed = subset_estimates(table.totals, noise, packed=packed, removal=removal, error=along)
    assert completed.unit is not None
    placed = subset_estimates(batch, noise, packed=packed, removal=removal)
    ratio = removal.noise_ratio(packed.sizes, table.totals, noise=noise, sensitivity=sensitivity)
    unit = noise.sigma * ratio
    mu = (np.asarray(change, dtype=np.float64) + (completed.mu - placed.mu) * completed.unit) / unit
    own, shared = completed.se * completed.unit / unit, error.joint * np.abs(mu)
    return replace(completed, mu=mu, se=np.hypot(own, shared), null=own, shared=shared, unit=unit)
