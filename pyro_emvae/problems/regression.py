r"""Two textbook posteriors on real data: eight schools, and logistic regression on the breast cancer data."""

from __future__ import annotations

import math
from types import SimpleNamespace as Params

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import positive
from torch.nn.functional import softplus

from .._checks import EmvaeError, fail
from ._math import expected_normal, gaussian_expectation, kl, predictor
from ._problem import Maker, Problem, ProblemTraits, data_plate, problem

__all__ = ["eight_schools", "logistic_regression", "sklearn_datasets"]

EFFECTS = [28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0]
STANDARD_ERRORS = [15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0]
LOG_EVIDENCE = -31.311347352293  # quadrature over tau with mu integrated analytically; a test repeats it


def eight_schools(*, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Problem:
    r"""Non-centred: $\mu\sim N(0,5)$, $\tau\sim C^+(5)$, $\eta_j\sim N(0,1)$, $y_j\sim N(\mu+\tau\eta_j,\sigma_j)$.

    The guide is mean field, normal for mu and eta, LogNormal for tau. The model has no parameters, so this is a problem
    for inference, not for EM. The exact ELBO is closed-form but for one one-dimensional quadrature (the prior of tau).

    Args:
        seed: Accepted as by all problems; there is nothing random here.
        dtype: Of data and parameters.
        device: Of data and parameters.

    Source: Rubin 1981; log p(y) = -31.311347 by quadrature.

    Example:
        >>> from pyro_emvae.problems import eight_schools
        >>> problem = eight_schools()
        >>> print(f"{problem.log_evidence():.5f}", bool(problem.elbo() < problem.log_evidence()))
        -31.31135 True
    """
    make = Maker(seed, dtype, device)
    y, errors = make(EFFECTS), make(STANDARD_ERRORS)
    zero, one, five = make(0.0), make(1.0), make(5.0)
    initial = make.initial(
        theta={},
        phi={
            "mu_loc": 3.0,
            "mu_scale": (2.5, positive),
            "log_tau_loc": 1.1,
            "log_tau_scale": (0.7, positive),
            "eta_loc": [0.4, 0.1, -0.2, 0.05, -0.3, -0.1, 0.35, 0.15],
            "eta_scale": ([0.8, 0.9, 1.0, 0.7, 0.85, 0.95, 0.75, 1.05], positive),
        },
    )

    def model(y: Tensor, errors: Tensor) -> None:
        mu = pyro.sample("mu", dist.Normal(zero, five))
        tau = pyro.sample("tau", dist.HalfCauchy(five))
        with pyro.plate("school", len(y), dim=-1, device=y.device):
            eta = pyro.sample("eta", dist.Normal(zero, one))
            pyro.sample("y", dist.Normal(mu + tau * eta, errors), obs=y)

    def guide(y: Tensor, errors: Tensor) -> None:
        pyro.sample("mu", dist.Normal(initial("mu_loc"), initial("mu_scale")))
        pyro.sample("tau", dist.LogNormal(initial("log_tau_loc"), initial("log_tau_scale")))
        loc, scale = initial("eta_loc"), initial("eta_scale")
        with pyro.plate("school", len(y), dim=-1, device=y.device):
            pyro.sample("eta", dist.Normal(loc, scale))

    def elbo(p: Params) -> Tensor:
        tau = dist.LogNormal(p.log_tau_loc, p.log_tau_scale)
        tau_square = tau.mean**2 + tau.variance
        variance = tau_square * (p.eta_loc**2 + p.eta_scale**2) - (tau.mean * p.eta_loc) ** 2 + p.mu_scale**2
        likelihood = expected_normal(y - p.mu_loc - tau.mean * p.eta_loc, variance, errors).sum()
        tail = gaussian_expectation(lambda u: softplus(2 * u - 2 * math.log(5)), p.log_tau_loc, p.log_tau_scale)
        tau_prior = math.log(2 / (math.pi * 5)) - tail
        mu = kl(dist.Normal(p.mu_loc, p.mu_scale), dist.Normal(zero, five))
        eta = kl(dist.Normal(p.eta_loc, p.eta_scale), dist.Normal(zero, one))
        return likelihood + tau_prior + tau.entropy() - mu - eta

    return problem(
        "eight_schools",
        model,
        guide,
        (y, errors),
        ("mu", "tau", "eta"),
        initial,
        ProblemTraits(),
        log_evidence=lambda p: make(LOG_EVIDENCE),
        elbo=elbo,
    )


def logistic_regression(
    *, subsample_size: int | None = None, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> Problem:
    r"""Bayesian logistic regression on scikit-learn's breast cancer data (569 data, 30 features and a bias).

    $w\sim N(0,I_{31})$, $y_n\sim\mathrm{Bern}(\mathrm{logit}=x_n^\top w)$; features standardised over all data; guide
    $N(m,\mathrm{diag}(e^{2s}))$ with m = s = 0 at the start. The evidence has no closed form. The ELBO needs one
    one-dimensional quadrature per datum, exact to rounding.

    Args:
        subsample_size: Draw a minibatch of this size inside the model.
        seed: Accepted as by all problems; there is nothing random here.
        dtype: Of data and parameters.
        device: Of data and parameters.

    Raises:
        EmvaeError: If scikit-learn is not installed.

    Source: Mohamed et al. 2020, "Monte Carlo gradient estimation in machine learning", section 8.

    Example:
        >>> from pyro_emvae.problems import logistic_regression
        >>> problem = logistic_regression()
        >>> tuple(problem.args[0].shape), round(float(problem.elbo()), 1)
        ((569, 31), -1226.6)
    """
    features, labels = sklearn_datasets("logistic_regression").load_breast_cancer(return_X_y=True)
    features = torch.as_tensor(features, dtype=torch.float64)
    features = (features - features.mean(0)) / features.std(0, correction=0)
    make = Maker(seed, dtype, device)
    x, y = make(torch.cat([features, features.new_ones(len(features), 1)], dim=-1)), make(labels)
    zero, one = torch.zeros_like(x[0]), torch.ones_like(x[0])
    initial = make.initial(theta={}, phi={"loc": zero, "log_scale": zero})

    def model(x: Tensor, y: Tensor) -> None:
        w = pyro.sample("w", dist.Normal(zero, one).to_event(1))
        with data_plate(x, subsample_size):
            x, y = pyro.subsample(x, event_dim=1), pyro.subsample(y, event_dim=0)
            pyro.sample("y", dist.Bernoulli(logits=predictor(w, x)), obs=y)

    def guide(x: Tensor, y: Tensor) -> None:
        pyro.sample("w", dist.Normal(initial("loc"), initial("log_scale").exp()).to_event(1))

    def elbo(p: Params) -> Tensor:
        scale = p.log_scale.exp()
        sign = 2 * y - 1
        margin, spread = sign * (x @ p.loc), (x**2 @ scale**2).sqrt()
        likelihood = -gaussian_expectation(lambda u: softplus(-u), margin, spread).sum()
        return likelihood - kl(dist.Normal(p.loc, scale), dist.Normal(zero, one))

    traits = ProblemTraits(subsampled=subsample_size is not None, needs=("sklearn",))
    return problem("logistic_regression", model, guide, (x, y), ("w",), initial, traits, elbo=elbo)


def sklearn_datasets(name: str):
    """Return the module `sklearn.datasets`, or say how to get it."""
    try:
        from sklearn import datasets
    except ImportError as cause:
        fail(
            EmvaeError,
            name,
            "load its data",
            got="no module 'sklearn'",
            because="the data ship with scikit-learn",
            fix="Run: pip install scikit-learn",
            cause=cause,
        )
    return datasets
