r"""What q looks like, given a context: one file per family, found by name in the registry.

A family knows nothing of data, plates or Pyro's handlers. Where its context comes from is the guide's business: free
parameters, an encoder, an encoder and some gradient steps.
"""

from ._charts import Chart
from ._quantiles import quantile as quantile_of
from ._supports import support_of
from .base import Family
from .bernoulli import Bernoulli
from .beta import Beta
from .categorical import Categorical
from .dirichlet import Dirichlet
from .flow import Flow
from .full_rank_normal import FullRankNormal
from .gamma import Gamma
from .log_normal import LogNormal
from .low_rank_normal import LowRankNormal
from .mixture import Mixture
from .normal import Normal
from .one_hot import OneHot
from .point_mass import PointMass
from .student_t import StudentT
from .von_mises import VonMises

__all__ = [
    "Bernoulli",
    "Beta",
    "Categorical",
    "Chart",
    "Dirichlet",
    "Family",
    "Flow",
    "FullRankNormal",
    "Gamma",
    "LogNormal",
    "LowRankNormal",
    "Mixture",
    "Normal",
    "OneHot",
    "PointMass",
    "StudentT",
    "VonMises",
    "quantile_of",
    "support_of",
]
