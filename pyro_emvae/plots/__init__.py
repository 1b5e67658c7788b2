r"""Figures from results, on plain matplotlib; each returns its Axes.

With ``ax=None`` a figure of its own is made without pyplot: no backend is chosen and nothing stays open. Save it with
``ax.figure.savefig(...)``; in a notebook, ``ax.figure`` shows it.
"""

from .elbo import plot_elbo
from .gradients import plot_snr, plot_variance_cost, plot_variance_ladder, snr_slopes
from .images import plot_latent, plot_reconstructions

__all__ = [
    "plot_elbo",
    "plot_latent",
    "plot_reconstructions",
    "plot_snr",
    "plot_variance_cost",
    "plot_variance_ladder",
    "snr_slopes",
]
