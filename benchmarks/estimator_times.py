r"""Time of one gradient step: against Pyro's losses, a loop by hand, and what the model evaluations imply."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import infer
from torch import Tensor, nn

import pyro_emvae as emvae
from pyro_emvae._registry import entries

from .discrete_vae import objective_of
from .timing import Call, Case, measure_all, table

LIMIT = 1.3
PIXELS, HIDDEN, BATCH = 196, 100, 64
MINUTES = 11.0
TEXT = """Both sides in turn in one process, warmed up, without the collector (`benchmarks/timing.py`): the median of
the ratios with its quartiles. Implied is the same step with the plain estimator (`score`, or `pathwise` for normal
latents; of `iwae` for the estimators of several samples) and as many particles as the estimator has model evaluations;
each may take at most {limit:g} times as long, eager and recorded. Against Pyro and against a loop by hand (no handlers,
one backward) there is no limit. The models are variational autoencoders, {pixels} pixels, {hidden} hidden units, batch
{batch}: 20 normal latents, 20 Bernoulli latents, and one of ten categories."""


class Nets(nn.Module):
    """Encoder and decoder with one hidden layer each."""

    def __init__(self, features: int, latents: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, features))
        self.decoder = nn.Sequential(nn.Linear(latents, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, PIXELS))


def vae(kind: str) -> tuple[Callable, Callable, Tensor, Nets]:
    """Return model, guide, images and networks for latents that are ``normal``, ``bernoulli`` or ``categorical``."""
    latents = 10 if kind == "categorical" else 20
    nets = Nets(2 * latents if kind == "normal" else latents, latents)
    zero = torch.zeros(latents)

    def latent(parameters: Tensor) -> Any:
        if kind == "normal":
            loc, log_scale = parameters.chunk(2, -1)
            return dist.Normal(loc, log_scale.exp()).to_event(1)
        if kind == "bernoulli":
            return dist.Bernoulli(logits=parameters).to_event(1)
        return dist.Categorical(logits=parameters)

    def embed(z: Tensor) -> Tensor:
        return torch.eye(latents)[z.long()] if kind == "categorical" else z

    def model(x: Tensor) -> None:
        pyro.module("nets", nets)
        prior = zero.repeat(2) if kind == "normal" else zero
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", latent(prior))
            pyro.sample("x", dist.Bernoulli(logits=nets.decoder(embed(z))).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("nets", nets)
        with pyro.plate("data", len(x)):
            pyro.sample("z", latent(nets.encoder(x)))

    return model, guide, (torch.rand(BATCH, PIXELS) < 0.3).float(), nets


def stepper(kind: str, loss: Callable[[], Any], backend: str = "eager", enumerate_z: bool = False) -> Call:
    """Return one step of SVI with a loss, with a learning rate of zero."""
    model, guide, x, _ = vae(kind)
    optim = pyro.optim.SGD({"lr": 0.0})
    made = loss()
    if enumerate_z:
        guide = infer.config_enumerate(guide, "parallel")
    if isinstance(made, emvae.MonteCarloELBO):
        svi = emvae.SVI(model, guide, optim, made, backend=backend)
    else:
        svi = infer.SVI(model, guide, optim, made)
    return lambda: svi.step(x)


def ours(estimator: str, particles: int, objective: str = "elbo") -> Callable[[], Any]:
    return lambda: emvae.MonteCarloELBO(particles, estimator=estimator, objective=objective)


def by_hand(kind: str, particles: int) -> Call:
    """Return a gradient step without Pyro: pathwise for normal latents, the score function for Bernoulli ones."""
    _, _, x, nets = vae(kind)
    optim = torch.optim.SGD(nets.parameters(), lr=0.0)

    def step() -> float:
        parameters = nets.encoder(x)
        if kind == "normal":
            loc, log_scale = parameters.chunk(2, -1)
            z = loc + log_scale.exp() * torch.randn(particles, *loc.shape)
            log_q = -0.5 * ((z - loc) / log_scale.exp()) ** 2 - log_scale
            log_p = -0.5 * z**2
        else:
            z = (torch.rand(particles, *parameters.shape) < parameters.sigmoid()).float()
            log_q = -nn.functional.binary_cross_entropy_with_logits(parameters.expand_as(z), z, reduction="none")
            log_p = torch.full_like(log_q, -math.log(2))
        log_q, log_p = log_q.sum(-1), log_p.sum(-1)
        data = x.expand(particles, *x.shape)
        likelihood = -nn.functional.binary_cross_entropy_with_logits(nets.decoder(z), data, reduction="none").sum(-1)
        f = likelihood + log_p - log_q
        surrogate = f if kind == "normal" else f + f.detach() * log_q
        loss = -surrogate.sum() / particles
        optim.zero_grad()
        loss.backward()
        optim.step()
        return float(-f.sum().detach() / particles)

    return step


def evaluations(kind: str, estimator: str, most: int = 8) -> tuple[int, int] | None:
    """Return the least particles (from 2 on) that an estimator takes here, and its model evaluations then."""
    model, guide, x, _ = vae(kind)
    for particles in range(2, most + 1):
        loss = ours(estimator, particles, objective_of(estimator))()
        try:
            with pyro.get_param_store().scope():
                loss.prepare(model, guide, (x,), {})
                loss.loss_and_grads(model, guide, x)  # only now is known at how many further values it looks
        except emvae.EmvaeError:
            continue
        return particles, loss.evaluations
    return None


def implied(kind: str, estimator: str, backend: str) -> Case | None:
    """Return the case of an estimator against the plain one at as many particles as it has evaluations."""
    found = evaluations(kind, estimator)
    if found is None:
        return None
    (particles, count), objective = found, objective_of(estimator)
    plain = "pathwise" if kind == "normal" else "score"

    def setup(is_ours: bool) -> Call:
        loss = ours(estimator, particles, objective) if is_ours else ours(plain, count, objective)
        return stepper(kind, loss, backend)

    what = f"`{estimator}`, {particles} particles, {count} evaluations, {kind}, {backend}, against `{plain}`"
    what += "" if objective == "elbo" else f", both of `{objective}`"
    return Case(f"{estimator}_{kind}_{backend}", what, LIMIT, setup)


def implied_cases() -> list[Case]:
    """Return a case for each registered estimator, kind of latent and backend that go together."""
    names = [e.name for e in entries("estimator") if not e.traits.arguments and e.traits.recordable]
    pairs = [(k, n, b) for k in ("normal", "bernoulli", "categorical") for n in names for b in ("eager", "graph")]
    found = [implied(*pair) for pair in pairs]
    return [case for case in found if case is not None]


def against(kind: str, estimator: str, particles: int, theirs: Callable[[], Any], name: str, **options: Any) -> Case:
    def setup(is_ours: bool) -> Call:
        return stepper(kind, ours(estimator, particles)) if is_ours else stepper(kind, theirs, **options)

    return Case(name, f"`{estimator}`, {particles} particles, {kind}, against Pyro's", math.inf, setup)


def pyro_cases() -> list[Case]:
    """Return cases against Pyro's losses, each with vectorized particles."""
    vectorized = {"num_particles": 4, "vectorize_particles": True, "max_plate_nesting": 1}
    trace, graph = partial(infer.Trace_ELBO, **vectorized), partial(infer.TraceGraph_ELBO, **vectorized)
    enum = partial(infer.TraceEnum_ELBO, max_plate_nesting=1)
    cases = [
        against("normal", "pathwise", 4, trace, "Trace_ELBO_normal"),
        against("bernoulli", "score", 4, trace, "Trace_ELBO_bernoulli"),
        against("normal", "pathwise", 4, graph, "TraceGraph_ELBO_normal"),
        against("bernoulli", "leave_one_out", 4, graph, "TraceGraph_ELBO_bernoulli"),
    ]
    if "enumerated" in {e.name for e in entries("estimator")}:
        cases.append(against("categorical", "enumerated", 1, enum, "TraceEnum_ELBO_categorical", enumerate_z=True))
    return cases


def hand_cases() -> list[Case]:
    """Return cases against the loop by hand, eager and recorded."""
    found = []
    for kind, estimator in (("normal", "pathwise"), ("bernoulli", "score")):
        for backend in ("eager", "graph"):

            def setup(is_ours: bool, kind: str = kind, estimator: str = estimator, backend: str = backend) -> Call:
                return stepper(kind, ours(estimator, 4), backend) if is_ours else by_hand(kind, 4)

            what = f"`{estimator}`, 4 particles, {kind}, {backend}, against a loop by hand"
            found.append(Case(f"by_hand_{kind}_{backend}", what, math.inf, setup))
    return found


def section(quick: bool = False, minutes: float = MINUTES) -> str:
    """Return the section's text and tables."""
    tables = {"Implied by the evaluations": implied_cases, "Pyro's losses": pyro_cases, "By hand": hand_cases}
    made = {title: cases() for title, cases in tables.items()}
    cases = [case for some in made.values() for case in some]
    results = iter(measure_all(cases, 0.01 * len(cases) if quick else minutes))
    parts = [TEXT.format(pixels=PIXELS, hidden=HIDDEN, batch=BATCH, limit=LIMIT)]
    for title, some in made.items():
        parts.append(f"**{title}**\n\n{table(list(itertools.islice(results, len(some))))}")
    return "\n\n".join(parts)
