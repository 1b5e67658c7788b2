# %% [markdown]
r"""# Monte Carlo EM: draws in place of an integral

Question: when the E-step has no closed form, what do draws from the prior, weighted draws from a guide, Markov chains
and SAEM cost, and how near do they come to the maximum?

Answer: draws from the prior, weighted by the likelihood, do for one latent per datum. With eight, one or two of 200
draws count, and the estimate is five standard errors off, with a Monte Carlo error that does not say so. A guide moves
that limit, chains remove it, and SAEM needs the fewest draws: two per iteration.

Running time: about a minute.
"""

# %%
import math
import os
import time

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from pyro.distributions import constraints

import pyro_emvae as emvae
from pyro_emvae.uncertainty import monte_carlo_error

SMOKE = os.environ.get("PYRO_EMVAE_SMOKE", "0") != "0"  # fewer iterations; errors are then larger, and so are bounds
EFFECTS, TRIALS = 256, 20  # random effects, in all, and the trials that each shows itself in
DIMS = (1, 8, 64) if SMOKE else (1, 2, 4, 8, 16, 32, 64)  # how many of the effects make one datum
DRAWS = 200  # per datum and iteration, where they are independent
ITERATIONS, BATCHES = (60, 4) if SMOKE else (300, 10)  # of EM; of the iterates, for their Monte Carlo error
RESULTS = "results/monte_carlo_em"

torch.set_default_dtype(torch.float64)
os.makedirs(RESULTS, exist_ok=True)

# %% [markdown]
# ## A model whose likelihood is known
# y_nd ~ Binomial(20, logit = u_nd), u_nd ~ N(mu, tau^2), for d = 1..D in datum n. The likelihood is a product of
# integrals over one number: the same effects may be put into data of any dimension D, and the maximum stays.

# %%
torch.manual_seed(0)
counts = dist.Binomial(TRIALS, logits=0.5 + 1.2 * torch.randn(EFFECTS)).sample()
z = torch.linspace(-9.0, 9.0, 361)  # nodes of the trapezoid rule


def log_p(theta):
    joint = dist.Binomial(TRIALS, logits=theta[0] + theta[1] * z).log_prob(counts[:, None])
    return (joint + dist.Normal(0.0, 1.0).log_prob(z)).logsumexp(-1).sum() + EFFECTS * math.log(0.05)


theta = torch.tensor([0.5, 1.2])
for _ in range(20):
    hessian = torch.autograd.functional.hessian(log_p, theta)
    theta = theta - torch.linalg.solve(hessian, torch.autograd.functional.jacobian(log_p, theta))
best, spread = float(theta[1]), float(torch.linalg.inv(-hessian)[1, 1].sqrt())
print(f"maximum of log p(y): tau = {best:.4f}, with a standard error of {spread:.3f}")


def model(y):
    mu = pyro.param("mu", torch.tensor(0.0))
    tau = pyro.param("tau", torch.tensor(0.8), constraint=constraints.positive)
    with pyro.plate("data", len(y)):
        u = pyro.sample("u", dist.Normal(mu, tau).expand([y.shape[1]]).to_event(1))
        pyro.sample("y", dist.Binomial(TRIALS, logits=u).to_event(1), obs=y)


def guide(y):
    share = (y + 1) / (TRIALS + 2)
    with pyro.plate("data", len(y)):
        pyro.sample("u", dist.Normal(share.logit(), (TRIALS * share * (1 - share) + 0.7).rsqrt()).to_event(1))


def statistics(values, y):
    size = torch.full((1, len(y)), float(y.shape[1]))
    return {"n": size, "u": values["u"].sum(-1), "uu": values["u"].square().sum(-1)}


def update(s, params):
    return {"mu": s["u"] / s["n"], "tau": (s["uu"] / s["n"] - (s["u"] / s["n"]) ** 2).sqrt()}


def fit(dim, e_step, m_step=None, guide=None, iterations=ITERATIONS):
    """Return how far off the mean of tau's late values is, its Monte Carlo error, and the share of draws that count."""
    pyro.clear_param_store()
    y = counts.reshape(-1, dim)
    em = emvae.EM(model, guide, e_step=e_step, m_step=m_step or emvae.steps.ClosedForm(statistics, update))
    run = em.run(y, max_iter=iterations, track="tau", stop=None, seed=0)
    found = monte_carlo_error(run, since=iterations // 4, num_batches=BATCHES)
    weights = em.posterior(y).support().log_weights.exp()
    off, error = (float(found.estimate["tau"]) - best) / spread, float(found["tau"]) / spread
    return off, error, float((1 / weights.square().sum(0)).mean()) / len(weights)


# %% [markdown]
# ## The more latents per datum, the fewer draws that count
# The weight of a draw is a product over its dimensions, so that the variance of its logarithm grows as their number.

# %%
shares = []
for dim in DIMS:
    off, _, share = fit(dim, emvae.steps.MonteCarlo("prior", DRAWS))
    near, _, more = fit(dim, emvae.steps.MonteCarlo("importance", DRAWS), guide=guide)
    shares.append((share, more))
    print(f"D = {dim:>2}: prior, ESS {share:5.1%}, off by {off:6.2f} se; guide, ESS {more:5.1%}, off by {near:5.2f} se")
    assert more > share and (abs(off) < 0.3 if dim == 1 else dim < 8 or abs(off) > 2.0)

# %% [markdown]
# ## Chains, and how long they remember
# At fixed theta: this M-step looks at the draws that it is given, and changes nothing.

# %%
memory = {}
for count in (1, 3, 10):
    draws = []
    look = emvae.steps.ClosedForm(lambda v, y, seen=draws: seen.append(v["u"]) or {}, lambda s, params: {})
    fit(8, emvae.steps.MonteCarlo("hmc", 20, num_leapfrog=count), look)
    u = torch.stack(draws) - torch.stack(draws).mean((0, 1))
    memory[count] = found = [float((u[k:] * u[: -k or None]).mean() / u.square().mean()) for k in range(12)]
    print(f"{count:>2} leapfrogs: autocorrelation of the draws {found[1]:.2f} at lag 1, {found[3]:.2f} at lag 3")
    assert abs(found[-1]) < 0.2

# %% [markdown]
# ## All of them, with eight latents per datum
# The stated error comes from the run itself, by batch means. It cannot know of the bias that few useful draws have.

# %%
saem = emvae.steps.Averaged(emvae.steps.ClosedForm(statistics, update), rate=0.6, burn_in=ITERATIONS // 6)
METHODS = {
    "prior": {"e_step": emvae.steps.MonteCarlo("prior", DRAWS)},
    "guide": {"e_step": emvae.steps.MonteCarlo("importance", DRAWS), "guide": guide},
    "HMC": {"e_step": emvae.steps.MonteCarlo("hmc", 10, num_leapfrog=3)},
    "SAEM": {"e_step": emvae.steps.MonteCarlo("hmc", 2, num_leapfrog=3), "m_step": saem, "iterations": 3 * ITERATIONS},
}
for name, arguments in METHODS.items():
    start = time.perf_counter()
    off, error, _ = fit(8, **arguments)
    print(f"{name:>6}: off by {off:6.3f} se, stated error {error:.3f} se, {time.perf_counter() - start:.1f} s")
    assert error < 0.3 and (abs(off) > 1.0 if name == "prior" else abs(off) < 4 * error)

one, two = Figure(figsize=(9, 3.5), layout="constrained").subplots(1, 2)
one.loglog(DIMS, shares, "o-", label=["prior", "guide"])
two.plot(list(zip(*memory.values(), strict=True)), "o-", label=[f"{count} leapfrogs" for count in memory])
for axes, x, y in ((one, "latents per datum", "share of draws that count"), (two, "lag", "autocorrelation of chains")):
    axes.set(xlabel=x, ylabel=y)
    axes.legend()
one.figure.savefig(f"{RESULTS}/draws.png", dpi=150)
print(f"\nThe figure is in {RESULTS}")
