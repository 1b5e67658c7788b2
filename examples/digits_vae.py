# %% [markdown]
r"""# A variational autoencoder of handwritten digits, trained by EM

Question: is it better to improve encoder and decoder in turn, as EM does, or at once? How much does the gradient
estimator matter? How far is the ELBO, which was trained, from log p(x), which was meant?

Answer: here EM gains nothing. After as many updates its held-out ELBO is the same but for the spread over seeds, after
as much time it is no higher, for an iteration takes two gradients. The score function's variance is more than a hundred
times the pathwise one's. The ELBO lies less than a nat per image below log p(x). The figures are printed.

Running time: two minutes or so on two cores.
"""

# %%
import os
import time

import arviz as az
import pyro
import pyro.distributions as dist
import torch
import xarray as xr
from matplotlib.figure import Figure
from torch import nn

import pyro_emvae as emvae

SMOKE = os.environ.get("PYRO_EMVAE_SMOKE", "0") != "0"  # shortens every loop; the numbers then mean nothing
SEEDS = (0, 1) if SMOKE else (0, 1, 2)  # of initial weights and draws; each trains once by EM and once jointly
UPDATES = 20 if SMOKE else 2000  # of the encoder, and as many of the decoder
BATCH = 200  # images per update, drawn anew for each
ADAM = {"lr": 3e-3}  # for both networks
HIDDEN, LATENTS = 100, 3  # the small setting of Kingma and Welling 2013, figure 3
REPLICATES = 100 if SMOKE else 1000  # gradients per estimator
SAMPLES = 100 if SMOKE else 5000  # importance samples per image
RESULTS = "results/digits_vae"

torch.set_num_threads(1)  # matrices so small are not worth sharing
os.makedirs(RESULTS, exist_ok=True)
digits = emvae.problems.load_digits_binary(num_train=1400)
train, test = digits.train, digits.test
print(f"{len(train)} digits to train on, {len(test)} held out; {train.shape[1]} pixels, black or white")


# %%
def make_vae(seed):
    """Return p: z ~ N(0, I), x ~ Bernoulli(decoder(z)); and q: z ~ N(location, scale^2), both from encoder(x)."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    decoder = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 64))
    encoder = nn.Sequential(nn.Linear(64, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * LATENTS))

    def model(x, batch=None):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x), subsample_size=batch) as index:
            z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS), 1.0).to_event(1))
            logits = decoder(z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x[index])
        return logits.sigmoid()

    return model, emvae.guides.AutoAmortized(model, encoder, family="normal")


# %% [markdown]
# ## Gradient estimators
# The score function multiplies by log p(x|z), a large negative number, about -45 nats per image at the start; pathwise
# differentiates it, as Trace_ELBO does. The decoder's gradient leaves no choice.


# %%
def compare(model, guide, stage):
    table = emvae.compare_gradients(model, guide, train, batch=BATCH, num_replicates=REPLICATES, seed=0)
    score, pathwise = table.dataset.variance_mean.sel(block="guide", estimator=["score", "pathwise"]).values
    print(f"\nGradients at the {stage}: the encoder's variance by score is {score / pathwise:.0f} x pathwise\n{table}")
    return table.dataset.expand_dims(stage=[stage])


start = compare(*make_vae(SEEDS[-1]), "start")

# %% [markdown]
# ## EM against joint SVI
# An EM iteration is a gradient step of the encoder (E), then one of the decoder (M) on new draws. A joint step takes
# both gradients from one draw, in less time. So EM is judged twice: when the joint run's time is up, and at the end.


# %%
def held_out_elbo(model, guide):
    return emvae.elbo(model, guide, test, num_particles=100, seed=0).value / len(test)


def train_both(seed):
    options = {"batch": BATCH, "seed": seed, "validation": test, "every": max(1, UPDATES // 50)}
    model, guide = make_vae(seed)
    em_elbo, clock = [], time.perf_counter()
    joint = emvae.SVI(model, guide, pyro.optim.Adam(ADAM), backend="graph").run(UPDATES, train, **options)
    seconds, joint_elbo = time.perf_counter() - clock, held_out_elbo(model, guide)

    def look(progress):
        if not em_elbo and time.perf_counter() - clock > seconds:
            em_elbo.append(held_out_elbo(progress.model, progress.guide))

    model, guide = make_vae(seed)
    clock = time.perf_counter()
    em = emvae.EM(model, guide, pyro.optim.Adam(ADAM), backend="graph")
    fit = em.run(train, max_iter=UPDATES, callbacks=look, **options)
    em_elbo.append(held_out_elbo(model, guide))
    print(f"seed {seed}: joint {joint_elbo:.3f} in {seconds:.1f} s; EM {em_elbo[0]:.3f}, at the end {em_elbo[-1]:.3f}")
    return fit, joint, (em_elbo[0] - joint_elbo, em_elbo[-1] - joint_elbo)


print(f"\nHeld-out ELBO in nats per image; {UPDATES} updates of each network")
runs = [train_both(seed) for seed in SEEDS]
for same, gain in zip(("wall time", "updates"), torch.tensor([gains for _, _, gains in runs]).T, strict=True):
    print(f"EM - joint at equal {same}: {gain.mean():+.3f} +- {gain.std() / len(gain) ** 0.5:.3f}, {len(gain)} seeds")
fit = runs[-1][0]
model, guide = fit.model, fit.guide
ladder = xr.concat([start, compare(model, guide, "end")], "stage")

# %%  log p(x) = ELBO + KL on the held-out images
bound = emvae.elbo(model, guide, test, num_particles=SAMPLES, seed=1)
evidence = emvae.log_evidence(model, guide, test, num_particles=SAMPLES, seed=2)
gap = emvae.elbo_gap(model, guide, test, num_particles=SAMPLES, seed=3)  # both from the same draws
print(f"\nELBO      {bound}\nlog p(x)  {evidence}\ngap       {gap.total:.1f} +- {gap.standard_error:.1f} nats")
doubtful = int((evidence.per_datum.khat > 0.7).sum())
print(f"The gap is {gap.total / len(test):.2f} per image; at {doubtful} images khat > 0.7: log p(x) may be higher")

# %%
held_out = Figure(figsize=(7, 4), layout="constrained").subplots()
for em, joint, _ in runs:
    for label, color, history in (("EM", "C0", em.history), ("joint SVI", "C1", joint.history)):
        seen = history.dropna("iteration", subset=["validation"])
        held_out.plot(seen.iteration_time, seen.validation / len(test), color, label=label if em is fit else None)
held_out.set(xlabel="seconds", ylabel="held-out ELBO (nats per image)")
held_out.legend()
z = guide.median(test)["z"]
figures = {
    "elbo_held_out": held_out,
    "elbo_training": emvae.plots.plot_elbo(fit, smooth=50),
    "variance_ladder": emvae.plots.plot_variance_ladder(ladder),
    "latent_map": emvae.plots.plot_latent(z, digits.test_labels),
    "reconstructions": emvae.plots.plot_reconstructions(test, pyro.condition(model, data={"z": z})(test)),
}
figures["latent_map"].set_title(f"2 of {LATENTS} latents, medians of q(z|x)")
for name, axes in figures.items():
    axes.figure.savefig(f"{RESULTS}/{name}.png", dpi=150)
ladder.to_dataframe().reset_index().to_csv(f"{RESULTS}/gradients.csv", index=False)
emvae.to_arviz(model, guide, test, fit=fit, num_samples=100, seed=0).to_netcdf(f"{RESULTS}/fit.nc", engine="h5netcdf")
print(f"\nThe results are in {RESULTS}; fit.nc has {', '.join(az.from_netcdf(f'{RESULTS}/fit.nc').groups())}")
assert bound.value - evidence.value <= 3 * (bound.standard_error**2 + evidence.standard_error**2) ** 0.5
assert ladder.bias_z.max() < ladder.attrs["bias_z_limit"], "two estimators have different means"
