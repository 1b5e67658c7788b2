r"""Estimates and bounds of the log evidence, each with its standard error."""

from .aggregate import ActiveUnits, active_units, mutual_information
from .bounds import elbo, elbo_gap, log_evidence
from .estimate import Estimate, Gap, PerDatum
from .importance import EvidenceMethod, Importance
from .layout import Request
from .quadrature import Quadrature

__all__ = [
    "ActiveUnits",
    "Estimate",
    "EvidenceMethod",
    "Gap",
    "Importance",
    "PerDatum",
    "Quadrature",
    "Request",
    "active_units",
    "elbo",
    "elbo_gap",
    "log_evidence",
    "mutual_information",
]
