r"""Problems with discrete latents, exact by enumeration."""

from __future__ import annotations

from types import SimpleNamespace as Params

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions.constraints import positive, simplex

from ._math import bits, predictor
from ._problem import Initial, Maker, Problem, ProblemTraits, data_plate, problem

__all__ = ["bernoulli", "bernoulli_vector", "categorical", "discrete_two_level"]


def bernoulli(*, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Problem:
    r"""Variable selection: $z_d\sim\mathrm{Bern}(\pi_d)$, $x_n\sim N(\sum_d F_{nd}w_dz_d,\sigma)$.

    Three sites, five data. The guide is Bernoulli with free logits. The posterior is dependent, so the ELBO stays
    below the evidence.

    Args:
        seed: Of the data.
        dtype: Of data and parameters.
        device: Of data and parameters.

    Example:
        >>> from pyro_emvae.problems import bernoulli
        >>> problem = bernoulli()
        >>> problem.sites, bool(problem.elbo() < problem.log_evidence())
        (('z_0', 'z_1', 'z_2'), True)
    """
    make = Maker(seed, dtype, device)
    initial = _selection_initial(make)

    def model(x: Tensor, features: Tensor) -> None:
        logits, weights, sigma = initial("prior_logits"), initial("weights"), initial("sigma")
        chosen = [pyro.sample(f"z_{d}", dist.Bernoulli(logits=logits[d])) for d in range(3)]
        with data_plate(x):
            loc = sum(z * weights[d] * features[:, d] for d, z in enumerate(chosen))
            pyro.sample("x", dist.Normal(loc, sigma), obs=x)

    def guide(x: Tensor, features: Tensor) -> None:
        logits = initial("logits")
        for d in range(3):
            pyro.sample(f"z_{d}", dist.Bernoulli(logits=logits[d]))

    return _selection("bernoulli", model, guide, ("z_0", "z_1", "z_2"), make, initial)


def bernoulli_vector(*, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Problem:
    """`bernoulli` with its three latents in one site of event shape (3,), which Pyro cannot enumerate. Args as there.

    Example:
        >>> from pyro_emvae.problems import bernoulli, bernoulli_vector
        >>> bernoulli_vector().sites, bool(bernoulli_vector().elbo() == bernoulli().elbo())
        (('z',), True)
    """
    make = Maker(seed, dtype, device)
    initial = _selection_initial(make)

    def model(x: Tensor, features: Tensor) -> None:
        z = pyro.sample("z", dist.Bernoulli(logits=initial("prior_logits")).to_event(1))
        loc = predictor(z * initial("weights"), features)
        with data_plate(x):
            pyro.sample("x", dist.Normal(loc, initial("sigma")), obs=x)

    def guide(x: Tensor, features: Tensor) -> None:
        pyro.sample("z", dist.Bernoulli(logits=initial("logits")).to_event(1))

    return _selection("bernoulli_vector", model, guide, ("z",), make, initial)


def _selection_initial(make: Maker) -> Initial:
    return make.initial(
        theta={"prior_logits": [-0.8, 0.3, 0.6], "weights": [0.7, -1.1, 0.4], "sigma": (0.9, positive)},
        phi={"logits": [0.5, -0.4, 0.9]},
    )


def _selection(name: str, model, guide, sites: tuple[str, ...], make: Maker, initial: Initial) -> Problem:
    features = make.noise(5, 3)
    x = make(features @ torch.tensor([0.9, 0.0, -0.7], dtype=torch.float64) + 0.8 * make.noise(5))
    features = make(features)
    outcomes = bits(3, like=x)

    def log_joint(p: Params) -> Tensor:
        prior = dist.Bernoulli(logits=p.prior_logits).log_prob(outcomes).sum(-1)
        loc = (outcomes * p.weights) @ features.T
        return prior + dist.Normal(loc, p.sigma).log_prob(x).sum(-1)

    def elbo(p: Params) -> Tensor:
        log_q = dist.Bernoulli(logits=p.logits).log_prob(outcomes).sum(-1)
        return _enumerated_elbo(log_joint(p), log_q)

    def posterior(p: Params) -> dict[str, dist.Distribution]:
        probs = log_joint(p).softmax(-1) @ outcomes
        if len(sites) == 1:
            return {"z": dist.Bernoulli(probs).to_event(1)}
        return {site: dist.Bernoulli(prob) for site, prob in zip(sites, probs, strict=True)}

    return problem(
        name,
        model,
        guide,
        (x, features),
        sites,
        initial,
        ProblemTraits(support="discrete", reparameterised=False, enumerable=len(sites) > 1),
        log_evidence=lambda p: log_joint(p).logsumexp(-1),
        elbo=elbo,
        posterior=posterior,
    )


def categorical(*, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Problem:
    r"""A mixture: $z_n\sim\mathrm{Cat}(\pi)$, $x_n\sim N(\mu_{z_n},\sigma)$, three components, five data.

    The guide is Categorical with free logits per datum, which contains the posterior. Args as for `bernoulli`.

    Example:
        >>> from pyro_emvae.problems import categorical
        >>> problem = categorical()
        >>> abs(float(problem.elbo(problem.exact_guide()) - problem.log_evidence())) < 1e-12
        True
    """
    make = Maker(seed, dtype, device)
    centres = torch.tensor([-2.0, 0.5, 3.0, 0.5, -2.0], dtype=torch.float64)
    x = make(centres + 0.7 * make.noise(5))
    initial = make.initial(
        theta={"weights": ([0.2, 0.5, 0.3], simplex), "means": [-1.4, 0.2, 2.1], "sigma": (1.1, positive)},
        phi={"logits": make.noise(5, 3)},
    )

    def model(x: Tensor) -> None:
        weights, means, sigma = initial("weights"), initial("means"), initial("sigma")
        with data_plate(x):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.Normal(means[z], sigma), obs=x)

    def guide(x: Tensor) -> None:
        logits = initial("logits")
        with data_plate(x):
            pyro.sample("z", dist.Categorical(logits=logits))

    def log_joint(p: Params) -> Tensor:
        return p.weights.log() + dist.Normal(p.means, p.sigma).log_prob(x.unsqueeze(-1))

    return problem(
        "categorical",
        model,
        guide,
        (x,),
        ("z",),
        initial,
        ProblemTraits(
            support="discrete", reparameterised=False, enumerable=True, local=True, exact_posterior_in_family=True
        ),
        log_evidence=lambda p: log_joint(p).logsumexp(-1).sum(),
        elbo=lambda p: _enumerated_elbo(log_joint(p), p.logits.log_softmax(-1)).sum(),
        posterior=lambda p: {"z": dist.Categorical(logits=log_joint(p))},
        exact_guide=lambda p: {"logits": log_joint(p).log_softmax(-1)},
    )


def discrete_two_level(*, seed: int = 0, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Problem:
    r"""Two binary latents, the second given the first, in model and guide; $x_n\sim N(\mu_{z_1z_2},\sigma)$.

    The guide has a logit for the first and one per value of the first for the second, so it contains the posterior.
    Args as for `bernoulli`.

    Example:
        >>> from pyro_emvae.problems import discrete_two_level
        >>> problem = discrete_two_level()
        >>> abs(float(problem.elbo(problem.exact_guide()) - problem.log_evidence())) < 1e-12
        True
    """
    make = Maker(seed, dtype, device)
    x = make(1.0 + 0.9 * make.noise(3))
    initial = make.initial(
        theta={
            "prior_logit": -0.4,
            "transition_logits": [0.7, -1.2],
            "means": [[-0.5, 0.8], [0.3, 1.9]],
            "sigma": (1.2, positive),
        },
        phi={"first_logit": 0.6, "second_logits": [-0.9, 0.5]},
    )

    def model(x: Tensor) -> None:
        first = pyro.sample("first", dist.Bernoulli(logits=initial("prior_logit")))
        second = pyro.sample("second", dist.Bernoulli(logits=initial("transition_logits")[first.long()]))
        loc = initial("means")[first.long(), second.long()]
        with data_plate(x):
            pyro.sample("x", dist.Normal(loc, initial("sigma")), obs=x)

    def guide(x: Tensor) -> None:
        first = pyro.sample("first", dist.Bernoulli(logits=initial("first_logit")))
        pyro.sample("second", dist.Bernoulli(logits=initial("second_logits")[first.long()]))

    def log_joint(p: Params) -> Tensor:
        likelihood = dist.Normal(p.means.unsqueeze(-1), p.sigma).log_prob(x).sum(-1)
        return _two_bits(p.prior_logit, p.transition_logits) + likelihood

    def elbo(p: Params) -> Tensor:
        log_q = _two_bits(p.first_logit, p.second_logits)
        return _enumerated_elbo(log_joint(p).flatten(), log_q.flatten())

    def posterior(p: Params) -> dict[str, dist.Distribution]:
        probs = log_joint(p).flatten().softmax(-1).reshape(2, 2)
        return {"first": dist.Bernoulli(probs[1].sum()), "second": dist.Bernoulli(probs[:, 1].sum())}

    def exact_guide(p: Params) -> dict[str, Tensor]:
        log_p = log_joint(p)
        first = log_p.logsumexp(-1)
        return {"first_logit": first[1] - first[0], "second_logits": log_p[:, 1] - log_p[:, 0]}

    return problem(
        "discrete_two_level",
        model,
        guide,
        (x,),
        ("first", "second"),
        initial,
        ProblemTraits(
            support="discrete", reparameterised=False, enumerable=True, two_level=True, exact_posterior_in_family=True
        ),
        log_evidence=lambda p: log_joint(p).flatten().logsumexp(-1),
        elbo=elbo,
        posterior=posterior,
        exact_guide=exact_guide,
    )


def _two_bits(first_logit: Tensor, second_logits: Tensor) -> Tensor:
    """Return the table of log probabilities of (first, second)."""
    bit = bits(1, like=first_logit)
    first = dist.Bernoulli(logits=first_logit).log_prob(bit)
    return first.unsqueeze(-1) + dist.Bernoulli(logits=second_logits.unsqueeze(-1)).log_prob(bit)


def _enumerated_elbo(log_joint: Tensor, log_q: Tensor) -> Tensor:
    return (log_q.exp() * (log_joint - log_q)).sum(-1)
