# %% [markdown]
r"""# A variational autoencoder of 1,797 handwritten digits

Question: is it better to train encoder and decoder in turn, as EM does, or together, as everybody does? What does the
gradient estimator matter? And how far is the bound that was trained from what it bounds?

Answer: ...

Running time: ...
"""

# %%
import os
import time
from pathlib import Path
from statistics import mean, stdev

import arviz as az
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from matplotlib.figure import Figure
from torch import nn

import pyro_emvae as emvae

SMOKE = os.environ.get("PYRO_EMVAE_SMOKE", "0") != "0"  # a run of seconds that shows nothing but that it runs
SEEDS = (0, 1) if SMOKE else (0, 1, 2)  # of initial weights and draws; each trains once by EM and once jointly
UPDATES = 20 if SMOKE else 1500  # of the encoder, and as many of the decoder
BATCH = 200  # images per update, drawn anew each time
LEARNING_RATE = 5e-3  # of Adam, for both networks
HIDDEN, LATENTS = 100, 3  # the small setting of Kingma and Welling 2013, figure 3
REPLICATES = 100 if SMOKE else 1000  # gradients per estimator
SAMPLES = 100 if SMOKE else 5000  # importance samples per image
RESULTS = Path("results/digits_vae")

torch.set_num_threads(1)  # these matrices are too small to share
RESULTS.mkdir(parents=True, exist_ok=True)
digits = emvae.problems.load_digits_binary(num_train=1000)
train, test = digits.train, digits.test
print(f"{len(train)} images to train on, {len(test)} held out, {train.shape[1]} black or white pixels each")


# %% [markdown]
# ## Model and guide
# p: z ~ N(0, I), x ~ Bernoulli(decoder(z)). q: z ~ N(mean(x), diag(scale(x))^2), both read from x by the encoder.


# %%
def make_vae(seed):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    decoder = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 64))
    encoder = nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * LATENTS))

    def model(x, batch=None):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), subsample_size=batch) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x[index])

    return model, emvae.guides.AutoAmortized(model, encoder, family="normal"), decoder


# %% [markdown]
# ## Gradient estimators before training
# The score function multiplies by log p(x|z), about -45 nats per image at first; the pathwise gradient differentiates it.


# %%
def compare(model, guide):
    trace_elbo = pyro.infer.Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    rows = ["score", "leave_one_out", "pathwise", trace_elbo]
    how = {"estimators": rows, "num_particles": 2, "num_replicates": REPLICATES, "seed": 0}
    return emvae.compare_gradients(model, guide, train, batch=BATCH, **how)


model, guide, decoder = make_vae(SEEDS[-1])
start = compare(model, guide)
print(f"\nGradients before training, with a minibatch of {BATCH}\n{start}")


# %% [markdown]
# ## Training: EM against joint SVI
# An EM iteration is a gradient step of the encoder (E), then one of the decoder (M) on draws from the new encoder. A joint
# step takes both gradients from one draw, in half the time. So EM is read twice: after as many updates, and at the moment
# at which the joint run was ready.


# %%
def held_out(model, guide):
    """ELBO in nats per test image, on common random numbers."""
    return emvae.elbo(model, guide, test, num_particles=100, seed=0).value / len(test)


def train_both(seed):
    options = {"batch": BATCH, "seed": seed, "validation": test, "every": max(1, UPDATES // 50)}
    model, guide, _ = make_vae(seed)
    clock = time.perf_counter()
    svi = emvae.SVI(model, guide, pyro.optim.Adam({"lr": LEARNING_RATE}), backend="graph")
    joint = svi.run(UPDATES, train, **options)
    seconds, joint_elbo, early = time.perf_counter() - clock, held_out(model, guide), []

    def look(progress):
        if not early and time.perf_counter() - clock > seconds:
            early.append(held_out(progress.model, progress.guide))

    model, guide, decoder = make_vae(seed)
    clock = time.perf_counter()
    em = emvae.EM(model, guide, pyro.optim.Adam({"lr": LEARNING_RATE}), backend="graph")
    fit = em.run(train, max_iter=UPDATES, callbacks=look, **options)
    em_elbo = held_out(model, guide)
    in_time = early[0] if early else em_elbo
    print(f"seed {seed}: jointly {joint_elbo:.3f} in {seconds:.1f} s; EM {in_time:.3f} by then, {em_elbo:.3f} in the end")
    return model, guide, decoder, fit, joint, {"updates": em_elbo - joint_elbo, "wall time": in_time - joint_elbo}


print(f"\nHeld-out ELBO in nats per image, {UPDATES} updates of each network")
runs = [train_both(seed) for seed in SEEDS]
for same in ("updates", "wall time"):
    gains = [run[-1][same] for run in runs]
    print(f"EM - joint at equal {same}: {mean(gains):+.3f} +- {stdev(gains) / len(gains) ** 0.5:.3f}")
model, guide, decoder, fit, _, _ = runs[-1]


# %% [markdown]
# ## Gradient estimators after training

# %%
end = compare(model, guide)
print(f"\nGradients after training\n{end}\n")
ladder = xr.concat([start.dataset, end.dataset], xr.Variable("stage", ["start", "end"]), combine_attrs="override")
ratio = ladder.variance_mean.sel(block="guide", estimator="score") / ladder.variance_mean.sel(
    block="guide", estimator="pathwise"
)
print(f"variance of score / pathwise for the encoder: {ratio[0]:.0f} at the start, {ratio[1]:.0f} at the end")
ladder.to_dataframe().reset_index().to_csv(RESULTS / "gradients.csv", index=False)

# %% [markdown]
# ## log p = ELBO + KL
# The bound and what it bounds from draws of their own; the gap from draws that both share, which halves its error.

# %%
how = {"num_particles": SAMPLES}
bound = emvae.elbo(model, guide, test, seed=1, **how)
evidence = emvae.log_evidence(model, guide, test, seed=2, **how)
gap = emvae.elbo_gap(model, guide, test, seed=3, **how)
print(f"\nThe {len(test)} held-out images, nats:\n  ELBO          {bound}\n  log evidence  {evidence}\n  gap           {gap}")

# %% [markdown]
# ## Figures and files

# %%
figure = Figure(figsize=(13, 4), layout="constrained")
training, by_update, by_second = figure.subplots(1, 3)
emvae.plots.plot_elbo(fit, ax=training, smooth=50)
for run in runs:
    for name, color, history in (("EM", "C0", run[3].history), ("joint", "C1", run[4].history)):
        seen = history.dropna("iteration", subset=["validation"])
        for ax, x in ((by_update, seen.iteration + 1), (by_second, seen.iteration_time)):
            ax.plot(x, seen.validation / len(test), color=color, label=name if run is runs[0] else None)
for ax, label in ((by_update, "updates of each network"), (by_second, "seconds")):
    ax.set(xlabel=label, ylabel="held-out ELBO (nats per image)")
    ax.legend()
figure.savefig(RESULTS / "elbo.png", dpi=150)
z = guide.median(test)["z"]
figures = {
    "variance_ladder": emvae.plots.plot_variance_ladder(ladder),
    "reconstructions": emvae.plots.plot_reconstructions(test, decoder(z).sigmoid()),
    "latent_map": emvae.plots.plot_latent(z, digits.test_labels),
}
for name, ax in figures.items():
    ax.figure.savefig(RESULTS / f"{name}.png", dpi=150)
data = emvae.to_arviz(model, guide, test, fit=fit, num_samples=SAMPLES // 50, seed=0, coords={"data": range(len(test))})
data.to_netcdf(RESULTS / "fit.nc", engine="h5netcdf")
print(f"\nfit.nc: {list(az.from_netcdf(RESULTS / 'fit.nc').groups())}")

# %% [markdown]
# ## What theory says

# %%
allowed = 3 * (bound.standard_error**2 + evidence.standard_error**2) ** 0.5
assert bound.value <= evidence.value + allowed, "the ELBO is no lower bound"
assert ladder.bias_z.max() < ladder.attrs["bias_z_limit"], "two estimators have different means"
print(f"\nELBO <= log evidence, and the estimators' means agree. The results are in {RESULTS}/")
