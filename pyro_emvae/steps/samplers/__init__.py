r"""Ways to draw from a posterior, for `steps.MonteCarlo`: one file each, chains apart."""

from .base import Draws, Facts, Sampler, Target, look
from .chains import check_same_data, fingerprint, gather, scatter
from .gibbs import Gibbs
from .hmc import HMC
from .importance import Importance, Prior, check_weights, per_unit
from .nuts import NUTS

__all__ = [
    "HMC",
    "NUTS",
    "SAMPLERS",
    "Draws",
    "Facts",
    "Gibbs",
    "Importance",
    "Prior",
    "Sampler",
    "Target",
    "check_same_data",
    "check_weights",
    "fingerprint",
    "gather",
    "look",
    "per_unit",
    "scatter",
]

SAMPLERS: dict[str, type[Sampler]] = {cls.name: cls for cls in (Prior, Importance, HMC, NUTS, Gibbs)}
