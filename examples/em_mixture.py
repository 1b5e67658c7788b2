# %% [markdown]
r"""# A mixture of normals by textbook EM

Question: three species of iris, their labels withheld: which mixture of normals has the highest likelihood, and how
does one know that EM has found it?

Answer: EM with the exact posterior never lowers log p(x). Where it ends depends on where it starts, and CONVERGED says
nothing about that. Of ten starts the best reaches -180.1855 nats for three components with full
covariances, as scikit-learn does; twelve single runs from random flowers all end lower. A run into a singular
covariance, where the likelihood has no bound, is called DEGENERATE.

Running time: about twenty seconds.
"""

# %%
import os

import pyro
import pyro.distributions as dist
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Ellipse
from pyro.distributions import constraints
from sklearn.datasets import load_iris
from sklearn.mixture import GaussianMixture

import pyro_emvae as emvae

SMOKE = os.environ.get("PYRO_EMVAE_SMOKE", "0") != "0"  # fewer starts and steps; the maxima are found anyway
N_INIT = 3 if SMOKE else 10  # starts of a run with restarts
STARTS = 2 if SMOKE else 12  # single runs from random starts, for the figure
GRADIENT_ITERATIONS = 3 if SMOKE else 150  # EM iterations with a gradient M-step of 20 steps
ADAM = {"lr": 0.02}  # of the gradient M-step
REFERENCE = {2: -214.3547, 3: -180.1855}  # maxima of log p(x) by scikit-learn 1.9, full covariances
RESULTS = "results/em_mixture"

torch.set_default_dtype(torch.float64)
os.makedirs(RESULTS, exist_ok=True)
iris = load_iris()
x = torch.tensor(iris.data)  # (150, 4), centimetres


# %% [markdown]
# ## The model
# z_n is the component of flower n. EM needs no guide: its E-step sums z out exactly. Scales are Cholesky factors.


# %%
def make_mixture(k):
    pyro.clear_param_store()

    def model(x):
        weights = pyro.param("weights", torch.full((k,), 1 / k), constraint=constraints.simplex)
        means = pyro.param("means", x[:: len(x) // k][:k].clone())
        spread = torch.linalg.cholesky(torch.cov(x.T)).expand(k, -1, -1)
        scales = pyro.param("scales", spread.clone(), constraint=constraints.lower_cholesky)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Categorical(weights))
            pyro.sample("x", dist.MultivariateNormal(means[z], scale_tril=scales[z]), obs=x)

    return model


def make_em(k):
    return emvae.EM(make_mixture(k), e_step="enumerated", m_step=emvae.steps.gaussian_mixture(k))


# %% [markdown]
# ## Restarts
# All starts make ten iterations, the best third goes on; the others are SCREENED. Start 0 has the model's own initial
# values; the others are clusters by k-means or k-means++, data drawn at random, and noise on the model's values.

# %%
for k, reference in REFERENCE.items():
    em = make_em(k)
    fit = em.run(x, n_init=N_INIT, seed=0)
    sklearn = GaussianMixture(k, n_init=N_INIT, tol=1e-8, max_iter=1000, random_state=0).fit(iris.data)
    print(f"k = {k}: {fit.objective:.4f} nats, {fit.status}; scikit-learn {len(x) * sklearn.score(iris.data):.4f}")
    print(fit.restarts.to_string(index=False), "\n")
    assert abs(fit.objective - reference) < 1e-3
    assert abs(fit.objective - em.posterior(x).log_evidence) < 1e-8
fit.restarts.to_csv(f"{RESULTS}/restarts.csv", index=False)
best = {name: value.clone() for name, value in fit.params.items()}

# %% [markdown]
# ## Responsibilities on new data
# `em.posterior` is the E-step at the present parameters, on any data. scikit-learn orders the components otherwise.

# %%
flowers = torch.tensor([[5.0, 3.4, 1.5, 0.2], [5.9, 2.8, 4.4, 1.4], [6.0, 2.8, 4.9, 1.7], [6.8, 3.1, 5.7, 2.2]])
order = torch.cdist(best["means"], torch.tensor(sklearn.means_)).argmin(-1)
responsibilities = em.posterior(flowers).marginal("z").probs
difference = (responsibilities - torch.tensor(sklearn.predict_proba(flowers.numpy()))[:, order]).abs().max()
print(f"p(component | flower)\n{responsibilities}\nlargest difference from scikit-learn: {difference:.1e}\n")
assert difference < 1e-2


# %% [markdown]
# ## The curve that only rises
# EM started from random flowers. No iteration lowers log p(x); the runs end at several maxima.


# %%
def random_start(seed):
    chosen = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:3]
    spread = torch.linalg.cholesky(torch.cov(x.T)).expand(3, -1, -1)
    return {"weights": torch.full((3,), 1 / 3), "means": x[chosen], "scales": spread}


curves = Figure(figsize=(7, 4), layout="constrained").subplots()
for seed in range(STARTS):
    run = make_em(3).run(x, init=random_start, seed=seed)
    elbo = run.history["objective"].values
    curves.plot(range(1, len(elbo) + 1), elbo, label=f"{elbo[-1]:.1f}")
    print(f"start {seed}: {elbo[-1]:10.4f} nats after {run.num_iterations:3d} iterations, {run.status}")
    assert (elbo[1:] >= elbo[:-1] - 1e-8).all()
curves.axhline(REFERENCE[3], color="black", linestyle="--")
curves.set(xlabel="iteration", ylabel="log p(x) = ELBO after E (nats)", xscale="log")
curves.legend(fontsize="x-small", ncols=2)

# %%  A component on the flowers whose petals are 0.2 cm wide: a plane
plane = random_start(0)
plane["means"] = torch.stack([x[x[:, 3] == 0.2].mean(0), x[50:100].mean(0), x[100:].mean(0)])
plane["scales"] = torch.stack([torch.diag(torch.tensor([0.4, 0.4, 0.2, 0.02])), *plane["scales"][1:]])
refused = make_em(3).run(x, init=lambda seed: plane)
print(f"\non a plane: {refused.status}. {refused.verdict.reason}")
assert refused.status == "DEGENERATE"

# %% [markdown]
# ## The same with a gradient M-step
# Adam may lower log p(x), so nothing is called converged. From start 0 its path leads to another maximum.

# %%
m_step = emvae.steps.Gradient(num_steps=20, optim=pyro.optim.Adam(ADAM))
climber = emvae.EM(make_mixture(3), e_step="enumerated", m_step=m_step)
climbed = climber.run(x, init=random_start, max_iter=GRADIENT_ITERATIONS, seed=0)
print(f"\ngradient M-step, start 0: {climber.posterior(x).log_evidence:.4f} nats, {climbed.status}")

# %%
ellipses = Figure(figsize=(6, 4), layout="constrained").subplots()
emvae.plots.plot_latent(x, iris.target_names[iris.target], ellipses, dims=(2, 3))
for mean, scale in zip(best["means"], best["scales"], strict=True):
    values, vectors = torch.linalg.eigh((scale @ scale.T)[2:, 2:])
    angle = float(torch.rad2deg(torch.atan2(vectors[1, 1], vectors[0, 1])))
    width, height = (4 * values.sqrt()).flip(0).tolist()  # two standard deviations to each side
    ellipses.add_patch(Ellipse(mean[2:].tolist(), width, height, angle=angle, fill=False))
ellipses.set(xlabel=iris.feature_names[2], ylabel=iris.feature_names[3])
for name, axes in {"elbo": curves, "components": ellipses}.items():
    axes.figure.savefig(f"{RESULTS}/{name}.png", dpi=150)
print(f"The figures and the table of restarts are in {RESULTS}")
