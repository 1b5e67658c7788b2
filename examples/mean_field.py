# %% [markdown]
r"""# Mean field: where it is exact, and where its variances are too small

Question: how good is a posterior that is a product of factors, one per latent, and can one tell beforehand?

Answer: it is exact where latents are independent given the data. Where they are correlated, means are right in a
Gaussian model but each variance is the inverse of the diagonal of the precision, not the diagonal of its inverse: with
two correlated slopes the standard deviation is too small by sqrt(1 - rho^2), a factor of 3 at rho = 0.95, where NUTS
has the right one. The bound loses -log(1 - rho^2) / 2; a factor over both latents, or a rotation of the features, takes
it back.

Running time: about a minute.
"""

# %%
import math
import os

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.infer import MCMC, NUTS

from pyro_emvae import steps

SMOKE = os.environ.get("PYRO_EMVAE_SMOKE", "0") != "0"  # fewer draws, and one correlation by NUTS
SAMPLES, WARMUP = (100, 50) if SMOKE else (1000, 300)  # of NUTS
BY_NUTS = [0.9] if SMOKE else [0.0, 0.5, 0.9, 0.95]  # correlations at which NUTS is run too
CORRELATIONS = [0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95]  # of the two features
NOISE, PRIOR = 0.5, 100.0  # standard deviations of the data, and of the slopes' prior
RESULTS = "results/mean_field"

torch.set_default_dtype(torch.float64)
os.makedirs(RESULTS, exist_ok=True)
pyro.set_rng_seed(0)


# %% [markdown]
# ## Exact: latents that are independent given the data
# A mean and a precision of Normal data depend on each other. As one Normal-Gamma factor they are the posterior, and the
# bound is log p(x); with a factor each, something is lost.


# %%
def unknown(x):
    tau = pyro.sample("tau", dist.Gamma(2.0, 1.0))
    mu = pyro.sample("mu", dist.Normal(0.0, (0.1 * tau).rsqrt()))
    with pyro.plate("data", len(x)):
        pyro.sample("x", dist.Normal(mu, tau.rsqrt()), obs=x)


x = 1.5 + 0.8 * torch.randn(12)
evidence = steps.Conjugate().infer(unknown, (x,), {}).log_evidence
bounds = {pairs: steps.MeanField(pairs=pairs).infer(unknown, (x,), {}).elbo for pairs in ("conjugate", "none")}
print(f"log p(x) = {evidence:.6f} nats")
print(f"bound, mean and precision as one factor {bounds['conjugate']:.6f}, as two {bounds['none']:.6f}")
assert abs(bounds["conjugate"] - evidence) < 1e-9 and bounds["none"] < evidence - 1e-3


# %% [markdown]
# ## Too small: two slopes whose features are correlated
# The precision of the slopes is X'X / sigma^2, plus that of the prior, which is small. Both slopes meet in each datum,
# so their factors are moved one after the other until the bound gains no more.


# %%
def regression(design, y):
    with pyro.plate("features", design.shape[1]):
        slopes = pyro.sample("slopes", dist.Normal(0.0, PRIOR))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal((slopes[..., None, :] * design).sum(-1), NOISE), obs=y)


def simulate(rho, count=50):
    """Two features of unit length whose correlation is rho in the sample, not only on average."""
    raw, _ = torch.linalg.qr(torch.randn(count, 2, generator=torch.Generator().manual_seed(1)))
    design = math.sqrt(count) * raw @ torch.tensor([[1.0, rho], [0.0, math.sqrt(1 - rho**2)]])
    noise = torch.randn(count, generator=torch.Generator().manual_seed(2))
    return design, design @ torch.tensor([1.0, -0.5]) + NOISE * noise


def exact(design, y):
    """Return the posterior's covariance and log p(y) in closed form."""
    precision = design.T @ design / NOISE**2 + torch.eye(2) / PRIOR**2
    marginal = PRIOR**2 * design @ design.T + NOISE**2 * torch.eye(len(y))
    return precision.inverse(), dist.MultivariateNormal(torch.zeros(len(y)), marginal).log_prob(y)


def by_nuts(design, y):
    chain = MCMC(NUTS(regression), num_samples=SAMPLES, warmup_steps=WARMUP, disable_progbar=True)
    chain.run(design, y)
    return chain.get_samples()["slopes"].std(0)


ratios, nuts = [], {}
print("\n  rho   sweeps   sd of mean field / exact   sqrt(1 - rho^2)   nats lost   -log(1 - rho^2) / 2   NUTS / exact")
for rho in CORRELATIONS:
    data = simulate(rho)
    covariance, log_evidence = exact(*data)
    found = steps.MeanField(num_sweeps=5000, tol=1e-10).infer(regression, data, {})
    sd = covariance.diagonal().sqrt()
    ratios.append(float((found.marginal("slopes").stddev / sd).mean()))
    lost, theory = float(log_evidence) - found.elbo, math.sqrt(1 - rho**2)
    if rho in BY_NUTS:
        nuts[rho] = float((by_nuts(*data) / sd).mean())
    print(
        f"  {rho:.2f}  {found.num_sweeps:6d}   {ratios[-1]:24.4f}   {theory:15.4f}   {lost:9.4f}   "
        f"{abs(math.log(theory)):19.4f}   {format(nuts[rho], '12.3f') if rho in nuts else ''}"
    )
    assert abs(ratios[-1] - theory) < 1e-4 and abs(lost + math.log(theory)) < 1e-3
    mean = covariance @ data[0].T @ data[1] / NOISE**2
    assert (found.marginal("slopes").mean - mean).abs().max() < 1e-4
assert all(abs(ratio - 1) < (0.3 if SMOKE else 0.15) for ratio in nuts.values())

# %% [markdown]
# ## Taken back
# In the coordinates of the eigenvectors of X'X the slopes are independent given the data. Mean field is exact there.

# %%
design, y = simulate(0.9)
_, vectors = torch.linalg.eigh(design.T @ design)
rotated = steps.MeanField(tol=1e-10).infer(regression, (design @ vectors, y), {})
covariance, log_evidence = exact(design, y)
back = vectors @ torch.diag(rotated.marginal("slopes").variance) @ vectors.T
print(f"\nrotated: bound {rotated.elbo:.6f}, log p(y) {float(log_evidence):.6f} nats, {rotated.num_sweeps} sweeps")
assert abs(rotated.elbo - float(log_evidence)) < 1e-8 and (back - covariance).abs().max() < 1e-10

# %%
axes = Figure(figsize=(6, 4), layout="constrained").subplots()
grid = torch.linspace(0, 0.99, 200)
axes.plot(grid, (1 - grid**2).sqrt(), label=r"$\sqrt{1-\rho^2}$", color="0.6")
axes.plot(CORRELATIONS, ratios, "o", label="mean field")
axes.plot(list(nuts), list(nuts.values()), "s", label="NUTS")
axes.set(xlabel="correlation of the features", ylabel="standard deviation, relative to the exact one", ylim=(0, 1.3))
axes.legend()
axes.figure.savefig(f"{RESULTS}/deviations.png", dpi=150)
print(f"\nThe figure is in {RESULTS}")
