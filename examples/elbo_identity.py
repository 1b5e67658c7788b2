# %% [markdown]
r"""# Maximum likelihood, MAP, and the three faces of the ELBO

Question: what does the ELBO measure, and why does raising it raise the likelihood?

Answer: for every distribution q of the latents, log p(y) = ELBO(q) + KL(q || posterior). The ELBO is the expected log
joint plus entropy, or reconstruction less KL to the prior, or log evidence less KL to the posterior: one number. After
an exact E-step the KL is zero, so an M-step cannot lower log p(y); with a prior on mu it finds MAP. It holds to 1e-10.

Running time: a few seconds.
"""

# %%
import os

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from torch.distributions import kl_divergence

import pyro_emvae as emvae

SMOKE = os.environ.get("PYRO_EMVAE_SMOKE", "0") != "0"  # fewer draws; whatever is exact stays so
PARTICLES = 200 if SMOKE else 20_000  # draws of q per Monte Carlo estimate; a tenth of them in the figure
TAU = 10.0  # standard deviation of the schools' effects, taken as known
PRIOR = (0.0, 5.0)  # mean and standard deviation of the prior on mu, for MAP
RESULTS = "results/elbo_identity"

torch.set_default_dtype(torch.float64)
os.makedirs(RESULTS, exist_ok=True)
y = torch.tensor([28.0, 8, -3, 7, -1, 1, 18, 12])  # effects of coaching (Rubin 1981), in points of the test
error = torch.tensor([15.0, 10, 16, 11, 9, 11, 10, 18])  # their standard errors


# %% [markdown]
# ## The model and its posterior
# School j has the effect z_j ~ N(mu, tau^2) and the estimate y_j ~ N(z_j, s_j^2); so y_j ~ N(mu, tau^2 + s_j^2).


# %%
def model(y, prior=None):
    mu = pyro.param("mu", torch.tensor(0.0))
    if prior is not None:
        pyro.factor("log_prior", dist.Normal(*prior).log_prob(mu))
    with pyro.plate("schools", len(y)):
        z = pyro.sample("z", dist.Normal(mu, TAU))
        pyro.sample("y", dist.Normal(z, error), obs=y)


def log_evidence(mu):
    return float(dist.Normal(mu, (TAU**2 + error**2).sqrt()).log_prob(y).sum())


def posterior(mu):
    precision = 1 / TAU**2 + 1 / error**2
    return dist.Normal((mu / TAU**2 + y / error**2) / precision, precision.rsqrt())


# %% [markdown]
# ## Maximum likelihood and MAP by EM
# Given z, the best mu is the mean of z, or with a prior a mean weighted by precisions. E replaces z by its expectation.


# %%
def fit_mu(prior=None):
    mean, width = prior or (0.0, float("inf"))

    def statistics(values, y, prior):
        return {"n": torch.ones_like(values["z"]), "z": values["z"]}

    def update(sums, params):
        return {"mu": (sums["z"] / TAU**2 + mean / width**2) / (sums["n"] / TAU**2 + 1 / width**2)}

    pyro.clear_param_store()
    em = emvae.EM(model, e_step="gaussian", m_step=emvae.steps.ClosedForm(statistics, update))
    return em, em.run(y, prior=prior, stop=emvae.convergence.Deterministic(tol=1e-12, change_tol=1e-7))


weight = 1 / (TAU**2 + error**2)
exact_ml = float((weight * y).sum() / weight.sum())
exact_map = float(((weight * y).sum() + PRIOR[0] / PRIOR[1] ** 2) / (weight.sum() + 1 / PRIOR[1] ** 2))
em, mode = fit_mu(PRIOR)
print(f"MAP                 mu = {float(mode.params['mu']):.10f}, exact {exact_map:.10f}; {mode.status}")
em, fit = fit_mu()
mu = float(fit.params["mu"])
print(f"maximum likelihood  mu = {mu:.10f}, exact {exact_ml:.10f}; {fit.status} in {fit.num_iterations} iterations")
print(f"log p(y) there      {fit.objective:.10f}, exact {log_evidence(mu):.10f}")
assert max(abs(mu - exact_ml), abs(float(mode.params["mu"]) - exact_map)) < 1e-5

# %% [markdown]
# ## Three faces of one number
# For any q; here the posterior with its standard deviation multiplied by a factor, the width.


# %%
def faces(q):
    """Return the ELBO in three ways, and KL(q || posterior), in closed form; nats."""
    prior, gap = dist.Normal(mu, TAU), float(kl_divergence(q, posterior(mu)).sum())
    reconstruction = dist.Normal(q.mean, error).log_prob(y) - 0.5 * (q.stddev / error) ** 2
    log_joint = reconstruction + prior.log_prob(q.mean) - 0.5 * (q.stddev / TAU) ** 2
    first, second = (log_joint + q.entropy()).sum(), (reconstruction - kl_divergence(q, prior)).sum()
    return float(first), float(second), log_evidence(mu) - gap, gap


def widened(factor):
    """Return q, and the guide that draws from it."""
    q = dist.Normal(posterior(mu).mean, factor * posterior(mu).stddev)

    def guide(y):
        with pyro.plate("schools", len(y)):
            pyro.sample("z", q)

    return q, guide


print("\nwidth   E log p(y,z) + H(q)   E log p(y|z) - KL(q||prior)   log p(y) - KL(q||posterior)        ELBO + KL")
for factor in (0.5, 1.0, 2.0):
    one, two, three, gap = faces(widened(factor)[0])
    print(f"{factor:5.1f}{one:22.10f}{two:30.10f}{three:30.10f}{one + gap:17.10f}")
    assert max(abs(one - two), abs(one + gap - log_evidence(mu))) < 1e-10

# %% [markdown]
# ## The same by Monte Carlo, as for models where nothing is known
# At the posterior, log p(y, z) - log q(z) is log p(y) for *every* draw: no error. A q that is too narrow leaves large
# weights to rare draws: khat warns that log p(y), and so the gap, is underestimated.

# %%
for factor in (1.0, 0.5):
    q, guide = widened(factor)
    exact, draws = faces(q)[0], {"num_particles": PARTICLES, "seed": 1}
    bound, gap = emvae.elbo(model, guide, y, **draws), emvae.elbo_gap(model, guide, y, **draws)
    print(f"\nwidth {factor}\nELBO      {bound}; exact {exact:.6f}\nlog p(y)  {gap.log_evidence}")
    print(f"gap       {gap.total:z.3f} +- {gap.standard_error:.3f}; exact {log_evidence(mu) - exact:.6f}")
    assert abs(bound.value - exact) < 5 * bound.standard_error + 1e-10
evidence = emvae.log_evidence(model, widened(1.0)[1], y, num_particles=PARTICLES, seed=2)
for value in (evidence.value, fit.objective, em.posterior(y).log_evidence):
    assert abs(value - log_evidence(mu)) < 1e-10

widths = torch.linspace(0.3, 2.5, 23)
axes = Figure(figsize=(7, 4), layout="constrained").subplots()
axes.plot(widths, [faces(widened(w)[0])[0] for w in widths], label="ELBO, closed form")
bounds = [emvae.elbo(model, widened(w)[1], y, num_particles=PARTICLES // 10, seed=4) for w in widths[::4]]
errors = [2 * b.standard_error for b in bounds]
axes.errorbar(widths[::4], [b.value for b in bounds], errors, fmt=".", label="emvae.elbo, two standard errors")
axes.axhline(log_evidence(mu), color="black", linestyle="--", label="log p(y)")
axes.set(xlabel="width: standard deviation of q / that of the posterior", ylabel="nats")
axes.legend()
axes.figure.savefig(f"{RESULTS}/elbo.png", dpi=150)
print(f"\nAll identities hold to 1e-10 nats. The figure is in {RESULTS}")
