"""Trade-off functions, Gaussian influence, composition and two-sample estimators (NumPy and SciPy only)."""

from finfluence.tradeoff.composition import GaussianLimit, compose, gaussian_limit, tensor_product
from finfluence.tradeoff.curves import TradeoffCurve, error_budget, g_mu, tradeoff_curve
from finfluence.tradeoff.diagnostics import Gaussianity, gaussianity
from finfluence.tradeoff.estimators import ESTIMATORS, Estimator, GaussianEstimates, compare, gaussian_estimates
from finfluence.tradeoff.gaussian import SIGN_CONVENTION, GaussianInfluence
from finfluence.tradeoff.laws import Alternative, NoncentralTLaw, NormalLaw, SamplingLaw, noncentrality
from finfluence.tradeoff.ranks import RankLaw
from finfluence.tradeoff.thresholds import ThresholdBounds

__all__ = [
    "ESTIMATORS",
    "SIGN_CONVENTION",
    "Alternative",
    "Estimator",
    "GaussianEstimates",
    "GaussianInfluence",
    "GaussianLimit",
    "Gaussianity",
    "NoncentralTLaw",
    "NormalLaw",
    "RankLaw",
    "SamplingLaw",
    "ThresholdBounds",
    "TradeoffCurve",
    "compare",
    "compose",
    "error_budget",
    "g_mu",
    "gaussian_estimates",
    "gaussian_limit",
    "gaussianity",
    "noncentrality",
    "tensor_product",
    "tradeoff_curve",
]
