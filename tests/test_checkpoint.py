r"""Checkpoints: a run that was killed anywhere and started again is bit for bit the run that was never killed."""

from __future__ import annotations

import copy
import functools
import math
import multiprocessing
import os
import pickle
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoDelta, AutoIAFNormal, AutoLowRankMultivariateNormal, AutoNormal
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_emvae import EM, SVI, MonteCarloELBO, checkpoint, convergence, estimators, optimizers, restarts, steps
from pyro_emvae._checks import CheckpointError, DegenerateError, NonFiniteError, StepError
from pyro_emvae._registry import Traits, entries
from pyro_emvae.guides import AutoMeanField
from pyro_emvae.monitor import Monitor
from pyro_emvae.particles import quiet
from pyro_emvae.posterior import GuidePosterior
from pyro_emvae.steps.samplers import SAMPLERS

X = torch.tensor([[0.3, -1.2], [1.7, 0.4], [-0.5, 2.2], [0.9, 0.8], [0.1, 0.2], [-1.0, 0.6]])
Y = X[:, 0]
WINDOWED = convergence.Windowed(tol=10.0, window=4, patience=1, warm_up=2, change_tol=10.0)


# Models -----------------------------------------------------------------------------------------------------------


def chain(x: Tensor) -> None:
    """z ~ N(theta, 1), x ~ N(z, scale): one continuous latent per datum."""
    theta = pyro.param("theta", lambda: torch.randn(()))
    scale = pyro.param("scale", torch.tensor(0.7), constraint=constraints.positive)
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Normal(z, scale), obs=x)


def chain_guide(x: Tensor) -> None:
    slope = pyro.param("slope", lambda: 0.1 * torch.randn(()))
    width = pyro.param("width", torch.tensor(0.5), constraint=constraints.interval(0.01, 3.0))
    with pyro.plate("data", len(x)):
        pyro.sample("z", dist.Normal(slope * x, width))


def mixture(x: Tensor) -> None:
    weights = pyro.param("weights", torch.tensor([0.4, 0.6]), constraint=constraints.simplex)
    means = pyro.param("means", lambda: torch.randn(2))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(means[k], 1.0), obs=x)


def mixture_guide(x: Tensor) -> None:
    slopes = pyro.param("slopes", lambda: torch.randn(2))
    with pyro.plate("data", len(x)):
        pyro.sample("k", dist.Categorical(logits=x[:, None] * slopes))


def noisy(x: Tensor) -> None:
    """A model that draws by numpy and Python too."""
    chain(x + 0.1 * float(np.random.standard_normal()) + 0.1 * random.gauss(0.0, 1.0))


def counts(x: Tensor) -> None:
    """A posterior that is not Gaussian: the mode is found from where the last E-step ended."""
    theta = pyro.param("theta", lambda: torch.randn(()))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta, 1.0))
        pyro.sample("x", dist.Poisson(z.exp()), obs=x.abs().round())


class Autoencoder:
    """Networks with dropout, batch norm in training mode and a frozen layer."""

    def __init__(self) -> None:
        self.decoder = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(0.3))
        self.encoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.3))
        self.head = nn.Linear(2, 2).requires_grad_(False)

    def model(self, x: Tensor) -> None:
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.head(self.decoder(z)), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        pyro.module("encoder", self.encoder)
        loc, scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


class Regression(PyroModule):
    """A random weight, a constrained parameter, a plain one, and a buffer that each run moves."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = PyroModule[nn.Linear](2, 1)
        self.linear.weight = PyroSample(dist.Normal(0.0, 1.0).expand([1, 2]).to_event(2))
        self.noise = PyroParam(torch.tensor(0.5), constraint=constraints.positive)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> None:
        self.calls += self.training
        mean = self.linear(x).squeeze(-1) / (1.0 + 0.01 * self.calls)
        with pyro.plate("data", len(x)):
            pyro.sample("y", dist.Normal(mean, self.noise), obs=x[:, 0])


class Walk(steps.HalfStep):
    """An E-step with a state of its own: a chain, numbers, text, nothing, and nested ones of these."""

    traits = Traits(slots=("E",))

    def init(self, problem, state, x):
        return {"z": torch.zeros_like(x), "accepted": [], "size": 0.5, "nested": {"kind": "walk", "last": None, "n": 0}}

    def expect(self, problem, state, x):
        own = state.steps["E"]
        z = own["z"] + own["size"] * torch.randn_like(x)
        with torch.no_grad():
            pyro.get_param_store()["slope"] = pyro.param("slope") + 0.01 * z.mean()
        nested = {"kind": "walk", "last": (float(z[0]), 1), "n": own["nested"]["n"] + 1}
        own = {"z": z, "accepted": [*own["accepted"], float(z.mean())], "size": own["size"] * 0.9, "nested": nested}
        return state.with_own("E", own), GuidePosterior(problem.model, problem.guide, (x,)), steps.Info()


# Jobs: how to make what is to be fitted, and how to run it --------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """`make` returns a new `SVI` or `EM`; `data` its arguments, or a loader; `total` iterations, or epochs."""

    make: Callable[[], Any]
    data: Callable[[], Any] = lambda: Y
    total: int = 5
    options: Callable[[Any], dict[str, Any]] = lambda fitter: {}

    def run(self, fitter: Any, total: int | None = None, **options: Any) -> Any:
        options = {"progress_bar": False, "every": 1} | self.options(fitter) | options
        data, total = self.data(), total or self.total
        if not isinstance(data, Tensor):
            return fitter.run(data=data, num_epochs=total, **options)
        return fitter.run(data, max_iter=total, **options) if is_em(fitter) else fitter.run(total, data, **options)


def is_em(fitter: Any) -> bool:
    return isinstance(fitter, EM)


def adam(lr: float = 0.05) -> Any:
    return pyro.optim.Adam({"lr": lr})


def autoencoder(cls: type = SVI, **options: Any) -> Any:
    vae = Autoencoder()
    optim = {"guide": adam(), "model": functools.partial(torch.optim.SGD, lr=0.01, momentum=0.9)}
    return cls(vae.model, vae.guide, optim, **options)


def automatic(guide: Callable, model: Callable = Regression, **options: Any) -> Any:
    model = model()
    return SVI(model, guide(model), adam(), **options)


def scheduled(scheduler: Callable, **options: Any) -> Job:
    options = {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}} | options
    return Job(
        lambda: SVI(chain, chain_guide, scheduler(dict(options))),
        options=lambda svi: {"callbacks": lambda p: svi.optim.step(*plateau(scheduler, p))},
    )


def plateau(scheduler: Callable, progress: Any) -> tuple:
    return (progress.loss,) if scheduler is pyro.optim.ReduceLROnPlateau else ()


def closed_form() -> steps.ClosedForm:
    def statistics(values: dict, x: Tensor) -> dict:
        r = torch.nn.functional.one_hot(values["k"], 2).to(x.dtype)
        return {"n": r, "x": r * x[..., None]}

    return steps.ClosedForm(statistics, lambda s, params: {"weights": s["n"] / s["n"].sum(), "means": s["x"] / s["n"]})


def textbook() -> EM:
    return EM(mixture, e_step=steps.Enumerated(), m_step=closed_form())


def three_phases() -> EM:
    """Phases over three blocks, the last two with averages and with momentum of their own."""

    def weights(s: dict, params: dict) -> dict:
        return {"weights": s["n"] / s["n"].sum()}

    averaged = steps.Averaged(steps.ClosedForm(closed_form().statistics, weights))
    phases = [("guide", steps.Gradient(2)), ("model", averaged), ("means", steps.Gradient())]
    return EM(mixture, mixture_guide, adam(), decaying(), steps=phases, blocks={"means": "means", "slopes": "guide"})


def decaying(**options: Any) -> MonteCarloELBO:
    return MonteCarloELBO(estimator=estimators.DecayingAverage(0.7), **options)


def top_k() -> MonteCarloELBO:
    return MonteCarloELBO(2, estimator="rao_blackwell_topk")


def own_steps() -> EM:
    """Each half-step has its optimizer and loss, with a state of its own."""
    e_step = steps.Gradient(2, optim=adam(0.1), loss=decaying(num_particles=2))
    return EM(mixture, mixture_guide, e_step=e_step, m_step=steps.Gradient(2, optim=torch.optim.NAdam, loss=decaying()))


def several() -> EM:
    """An objective of several particles, whose estimator chooses by what it saw before."""
    return EM(mixture, mixture_guide, adam(), MonteCarloELBO(4, objective="iwae"))


def growing() -> steps.MonteCarlo:
    """Draws whose number rises while the run is watched."""
    return steps.MonteCarlo("prior", 5, growth=convergence.Ascent(tol=1e-4))


def aggressive(batches: Any = None, rule: type = steps.MutualInformation, data: Tensor = Y) -> steps.Gradient:
    """An inner loop that is over after a few iterations: before, at and after a checkpoint."""
    return steps.Gradient(until=rule(data, every=1, patience=1, window=2, max_steps=6), batches=batches)


class ShuffledByPython:
    """Batches in an order of Python's generator."""

    def __iter__(self) -> Iterator[Tensor]:
        order = random.sample(range(6), 6)
        return iter([X[order[:3]], X[order[3:]]])


class ShuffledByItself:
    """Batches in an order of its own generator, which it gives as its state."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(int(torch.randint(1000, ())))

    def __iter__(self) -> Iterator[Tensor]:
        order = self.rng.permutation(6)
        return iter([X[order[:3]], X[order[3:]]])

    def state_dict(self) -> dict:
        return {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict) -> None:
        self.rng.bit_generator.state = state["rng"]


def loader(**options: Any) -> DataLoader:
    return DataLoader(TensorDataset(X), batch_size=2, shuffle=True, **options)


def seeded_loader() -> DataLoader:
    return loader(generator=torch.Generator().manual_seed(int(torch.randint(1000, ()))))


def with_bad_batch() -> list:
    """The first batch of each epoch overflows: a run that reverts needs what was before the epoch's end."""
    return [Y + 1e30, Y, Y + 1.0]


def simple(optim: Any, cls: type = SVI, **options: Any) -> Callable[[], Any]:
    return lambda: cls(chain, chain_guide, optim(), **options)


JOBS = {
    "svi": Job(simple(adam)),
    "em": Job(simple(adam, EM), options=lambda em: {"validation": Y + 0.1, "track": ["theta", "scale"]}),
    "joint": Job(simple(adam, EM, schedule="joint")),
    "clipped_adam": Job(simple(lambda: pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.8, "clip_norm": 0.5}))),
    "per_parameter": Job(simple(lambda: pyro.optim.Adam(lambda name: {"lr": 0.1 if name == "theta" else 0.01}))),
    "rule": Job(simple(lambda: optimizers.AdamW(lr=0.1))),
    "rmsprop": Job(simple(lambda: functools.partial(torch.optim.RMSprop, lr=0.1, momentum=0.5, centered=True))),
    "amsgrad": Job(simple(lambda: functools.partial(torch.optim.Adam, lr=0.1, amsgrad=True))),
    "nadam": Job(simple(lambda: torch.optim.NAdam)),
    "function": Job(simple(lambda: lambda params: torch.optim.Adagrad(params, lr=0.1))),
    "exponential": scheduled(pyro.optim.ExponentialLR, gamma=0.5),
    "multi_step": scheduled(pyro.optim.MultiStepLR, milestones=[2, 4], gamma=0.1),
    "lambda": scheduled(pyro.optim.LambdaLR, lr_lambda=lambda n: 0.9**n),
    "one_cycle": scheduled(pyro.optim.OneCycleLR, max_lr=0.2, total_steps=20),
    "plateau": scheduled(pyro.optim.ReduceLROnPlateau, patience=0, factor=0.5),
    "decaying_average": Job(lambda: SVI(mixture, mixture_guide, adam(), decaying())),
    "weighted draws, learned coefficient": Job(lambda: SVI(mixture, mixture_guide, adam(), top_k())),
    "own_steps": Job(own_steps),
    "several": Job(several),
    "numpy_and_python": Job(lambda: SVI(noisy, chain_guide, adam())),
    "batch_norm": Job(lambda: autoencoder(SVI), lambda: X),
    "batch_norm_em": Job(lambda: autoencoder(EM), lambda: X),
    "auto_normal": Job(lambda: automatic(AutoNormal), lambda: X),
    "auto_low_rank": Job(lambda: automatic(AutoLowRankMultivariateNormal), lambda: X),
    "auto_delta": Job(lambda: automatic(AutoDelta), lambda: X),
    "auto_flow": Job(lambda: automatic(lambda m: AutoIAFNormal(m, hidden_dim=[8], num_transforms=2)), lambda: X),
    "graph": Job(simple(adam, backend="graph")),
    "graph_em": Job(simple(adam, EM, backend="graph")),
    "graph_batch_norm": Job(lambda: autoencoder(EM, backend="graph"), lambda: X),
    "graph_decaying": Job(lambda: SVI(mixture, mixture_guide, adam(), decaying(), backend="graph")),
    "textbook": Job(textbook),
    "three_phases": Job(three_phases, options=lambda em: {"history": "full"}),
    "converging": Job(textbook, total=40),
    "to_be_accelerated": Job(textbook, total=8, options=lambda em: {"accelerate": "squarem", "track": ["means"]}),
    "accelerated": Job(textbook, total=4, options=lambda em: {"accelerate": "squarem"}),
    "full_history": Job(textbook, total=6, options=lambda em: {"history": "full"}),
    "full_history_of_a_guide": Job(simple(adam, EM), options=lambda em: {"history": "full"}),
    "windowed": Job(simple(adam), total=11, options=lambda svi: {"stop": WINDOWED}),
    "windowed_loader": Job(lambda: autoencoder(EM), loader, 12, lambda em: {"stop": WINDOWED}),
    "counts": Job(lambda: EM(counts, optim=adam(), e_step=steps.Laplace(tol=1e-3))),
    "counts_on_nodes": Job(lambda: EM(counts, optim=adam(), e_step=steps.Laplace(tol=1e-3, num_nodes=5))),
    "averaged": Job(lambda: EM(mixture, e_step="enumerated", m_step=steps.Averaged(closed_form(), average_from=2))),
    "damped": Job(lambda: EM(mixture, e_step="enumerated", m_step=steps.Damped(closed_form(), 0.5))),
    "growing": Job(lambda: EM(mixture, e_step=growing(), m_step=closed_form())),
    "sampled_means": Job(lambda: EM(mixture, e_step=steps.MonteCarlo("prior"), m_step=closed_form())),
    "enumerated": Job(lambda: EM(mixture, optim=adam(), e_step=steps.Enumerated())),
    "own_state": Job(lambda: EM(chain, chain_guide, adam(), e_step=Walk())),
    "loader": Job(lambda: autoencoder(EM), loader, 3),
    "aggressive": Job(simple(adam, EM, e_step=aggressive()), total=6),
    "aggressive_loader": Job(lambda: autoencoder(EM, e_step=aggressive(loader(), data=X)), loader, 3),
    "aggressive_held_out": Job(simple(adam, EM, e_step=aggressive(rule=steps.HeldOut)), total=6),
    "wake_and_sleep": Job(lambda: EM(mixture, mixture_guide, adam(), e_step=steps.WakeSleep(3, insomnia=0.5))),
    "graph_sleep": Job(simple(adam, EM, e_step=steps.Sleep(num_steps=2), backend="graph")),
    "seeded_loader": Job(lambda: autoencoder(SVI), seeded_loader, 3),
    "persistent_workers": Job(lambda: autoencoder(SVI), lambda: loader(num_workers=1, persistent_workers=True), 3),
    "python_loader": Job(lambda: autoencoder(SVI), ShuffledByPython, 3),
    "loader_with_state": Job(lambda: autoencoder(SVI), ShuffledByItself, 3),
    "skip": Job(simple(adam, on_nonfinite="skip"), with_bad_batch, 3),
    "revert": Job(simple(adam, EM), with_bad_batch, 3, lambda em: {"on_nonfinite": "revert"}),
}


def registered(slot: str) -> dict[str, Job]:
    """Every registered half-step that can be made from its name, on a model whose latents it takes."""
    found = {}
    for entry in entries("step"):
        if slot in entry.traits.slots and not entry.traits.arguments:
            model, guide = (mixture, mixture_guide) if entry.traits.latents == "discrete" else (chain, chain_guide)
            step = {"e_step" if slot == "E" else "m_step": entry.name}
            make = AutoMeanField if entry.traits.free_guide else lambda model, guide=guide: guide
            found[f"{slot}_{entry.name}"] = Job(lambda m=model, g=make, s=step: EM(m, g(m), adam(), **s))
    return found


def sampled() -> dict[str, Job]:
    """The Monte Carlo E-step by each sampler."""
    found = {}
    for name, cls in SAMPLERS.items():
        model, guide = (mixture, mixture_guide) if cls.latents == "discrete" else (chain, chain_guide)
        few = {"num_warmup": 10} if "num_warmup" in {f.name for f in fields(cls)} else {}
        make = functools.partial(steps.MonteCarlo, name, num_particles=5, **few)
        found[f"by_{name}"] = Job(lambda m=model, g=guide, make=make: EM(m, g, adam(), e_step=make()))
    return found


def bayesian(x: Tensor) -> None:
    """A mixture whose unknowns are all latent, in minibatches."""
    with pyro.plate("components", 2):
        means = pyro.sample("means", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x), subsample_size=4) as rows:
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.4, 0.6])))
        pyro.sample("x", dist.Normal(means[k], 1.0), obs=x[rows])


def shifted(x: Tensor) -> None:
    """A latent that all data share and one per datum, in minibatches."""
    mu, theta = pyro.sample("mu", dist.Normal(0.0, 1.0)), pyro.param("theta", torch.tensor(0.5))
    with pyro.plate("data", len(x), subsample_size=4) as rows:
        z = pyro.sample("z", dist.Normal(mu, 1.0))
        pyro.sample("x", dist.Normal(z + theta, 1.0), obs=x[rows])


def falling() -> steps.NaturalGradient:
    return steps.NaturalGradient(0.5, num_steps=2, num_particles=3, forgetting=0.7)


JOBS |= registered("E") | registered("M") | sampled()
JOBS["natural_gradient"] = Job(lambda: EM(shifted, AutoMeanField(shifted), adam(), e_step=falling()))
JOBS["by_minibatches"] = Job(lambda: EM(bayesian, e_step=steps.MeanField(), m_step=steps.Fixed()))


def searching(**options: Any) -> Callable[[Any], dict[str, Any]]:
    return lambda fitter: {"n_init": 4, "every": 3} | options


SEARCHES = {  # many starts: of exact half-steps side by side, screened by 10 iterations, of others one by one
    "search": Job(lambda: some_degenerate(), lambda: DOUBLE, 30, searching(stop=None, seed=4)),
    "search_svi": Job(simple(adam), total=24, options=searching(seed=2)),
    "search_em": Job(lambda: autoencoder(EM), lambda: X, 15, searching(init="noise")),
    "search_accelerated": Job(textbook, total=14, options=searching(accelerate="squarem", stop=None)),
    "search_loader": Job(lambda: autoencoder(SVI), seeded_loader, 4, searching(seed=1)),
}
DOUBLE = torch.randn(40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def doubles(x: Tensor) -> None:
    weights = pyro.param("weights", x.new_tensor([0.4, 0.6]), constraint=constraints.simplex)
    means = pyro.param("means", lambda: torch.randn(2, dtype=x.dtype))
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Categorical(weights))
        pyro.sample("x", dist.Normal(means[k], 0.5), obs=x)


def not_near(s: dict, params: dict) -> dict:
    """Some noisy starts are degenerate, and are drawn again."""
    if bool(params["means"][0] < params["means"][1] + 1.3):
        raise DegenerateError("too near")
    return {"weights": s["n"] / s["n"].sum(), "means": s["x"] / s["n"]}


def some_degenerate() -> EM:
    return EM(doubles, e_step="enumerated", m_step=steps.ClosedForm(closed_form().statistics, not_near))


# What is compared -------------------------------------------------------------------------------------------------


def afresh(seed: int) -> None:
    """As in a new process: no parameters, and generators that are anywhere."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)


def observed(job: Job, fitter: Any, fit: Any) -> dict[str, Any]:
    """All that one sees of a run from outside, without the package's own idea of its state, and two further steps."""
    rows = {row.name: row.leaf.detach().clone() for row in fitter.blocks.rows}
    modules = {m for m in fitter.engine.parameters.modules if isinstance(m, nn.Module)}
    seen = {
        "status": (fit.status, fit.num_iterations, fit.objective, *astuple(fit.verdict)),
        "params": fit.params,
        "leaves": rows,
        "modules": sorted((type(m).__name__, pickle.dumps(clones(m.state_dict()))) for m in modules),
        "optim": fitter.optim.get_state(),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "history": pickle.dumps(fit.history.drop_vars(["time", "iteration_time"]).to_dict()),
        "steps": copy.deepcopy(fitter.engine.steps),
        "counts": (fitter.engine.count, fitter.engine.skipped),
        "restarts": None if fit.restarts is None else fit.restarts.astype(str).to_dict(),
    }
    batch = job.data()
    args = (batch,) if isinstance(batch, Tensor) else (X if "chain" not in fitter.model.__name__ else Y,)
    seen["next"] = [fitter.step(*args) for _ in range(2)]
    seen["then"] = {row.name: row.leaf.detach().clone() for row in fitter.blocks.rows}
    return seen


def clones(tensors: dict[str, Tensor]) -> dict[str, list]:
    return {name: t.tolist() for name, t in tensors.items()}


def difference(a: Any, b: Any, where: str = "") -> str:
    """Return the first place at which two trees differ in a bit, or nothing."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [] if a.keys() == b.keys() else [f"{where}: keys {a.keys() ^ b.keys()}"]
        parts = keys or [difference(a[k], b[k], f"{where}.{k}") for k in a]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        short = [] if len(a) == len(b) else [f"{where}: lengths {len(a)}, {len(b)}"]
        parts = short or [difference(x, y, f"{where}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True))]
    elif isinstance(a, Tensor | np.ndarray):
        a, b = torch.as_tensor(a.astype(np.int64) if isinstance(a, np.ndarray) else a), torch.as_tensor(b)
        same = a.shape == b.shape and torch.equal(torch.nan_to_num(a, nan=7.7), torch.nan_to_num(b.to(a), nan=7.7))
        parts = [] if same else [f"{where}: {a} and {b}"]
    else:
        parts = [] if a == b or (a != a and b != b) else [f"{where}: {a!r} and {b!r}"]
    return next(filter(None, parts), "")


def uninterrupted(job: Job, total: int | None = None) -> dict[str, Any]:
    afresh(0)
    fitter = job.make()
    return observed(job, fitter, job.run(fitter, total))


def never_killed(name: str) -> dict[str, Any]:
    if name not in KNOWN:
        with quiet(), pyro.get_param_store().scope():
            KNOWN[name] = uninterrupted((JOBS | SEARCHES)[name])
    return KNOWN[name]


KNOWN: dict[str, dict[str, Any]] = {}


# Stopped and started again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", JOBS)
def test_a_run_in_three_parts_is_the_run_in_one(tmp_path, name):
    job, path = JOBS[name], tmp_path / "run.pt"
    expected = never_killed(name)
    for part, total in enumerate((1, job.total // 2 + 1, job.total)):
        afresh(1000 * part)
        fitter = job.make()
        fit = job.run(fitter, total, checkpoint=path)
    assert difference(expected, observed(job, fitter, fit)) == ""
    assert fit.provenance["resumed_from"].startswith("iteration ")


@pytest.mark.parametrize("name", ["svi", "batch_norm_em", "own_state", "graph_em", "loader"])
def test_checkpoints_change_nothing(tmp_path, name):
    job = JOBS[name]
    afresh(0)
    fitter = job.make()
    fit = job.run(fitter, checkpoint=tmp_path / "run.pt")
    assert "resumed_from" not in fit.provenance
    assert difference(never_killed(name), observed(job, fitter, fit)) == ""


# Killed by SIGKILL ------------------------------------------------------------------------------------------------


def kill_at(place: str, count: int) -> None:
    """Let this process kill itself at the `count`-th pass of a place in the run or in the write of a file."""
    seen = Counter()

    def wrap(owner: Any, attribute: str, name: str, after: bool = False, first: Callable | None = None) -> None:
        original = getattr(owner, attribute)

        def replaced(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs) if after else None
            seen[name] += 1
            if (name, seen[name]) == (place, count):
                if first is not None:
                    first(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return result if after else original(*args, **kwargs)

        setattr(owner, attribute, replaced)

    def half(content: Any, file: Any) -> None:
        file.write(b"PK" + pickle.dumps(list(content)))
        file.flush()

    wrap(torch, "save", "half written", first=half)
    wrap(os, "fsync", "not yet on disk")
    wrap(os, "replace", "not yet renamed")
    wrap(os, "replace", "renamed", after=True)
    for owner in (SVI, EM):
        wrap(owner, "_iterate", "before an iteration")
    wrap(restarts.Lockstep, "_advance", "before one of all starts")
    for entry in entries("step"):
        if "M" in entry.traits.slots and isinstance(entry.factory, type):
            wrap(entry.factory, "maximise", "between E and M")


def child(name: str, total: int, path: Path, result: Path, kill: tuple[str, int] | None) -> None:
    """What a process does: the whole run, from its beginning or its file; at its end it writes what it sees."""
    torch.set_num_threads(1)
    if kill is not None:
        kill_at(*kill)
    afresh(os.getpid() if path.exists() else 0)
    job = (JOBS | SEARCHES)[name]
    fitter = job.make()
    fit = job.run(fitter, total, checkpoint=path)
    result.write_bytes(pickle.dumps(observed(job, fitter, fit)))


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "pyro", "xarray", "torch._dynamo", "pyro_emvae", "pytest"])


def started(name: str, total: int, folder: Path, kill: tuple[str, int] | None = None, delay: float = 120.0) -> int:
    """Run a job in a new process, kill it after `delay` seconds, and return its exit code."""
    process = FORKS.Process(target=child, args=(name, total, folder / "run.pt", folder / "result", kill))
    process.start()
    process.join(delay)
    process.kill()
    process.join()
    return process.exitcode


def result_in(folder: Path) -> dict[str, Any]:
    return pickle.loads((folder / "result").read_bytes())


PLACES = (
    "half written",
    "not yet on disk",
    "not yet renamed",
    "renamed",
    "before an iteration",
    "between E and M",
)


@pytest.mark.parametrize("name", ["batch_norm_em", "loader"])
def test_killed_at_every_place(tmp_path, name):
    for place in PLACES:
        for count in (1, 2) if place == "half written" else (2,):
            assert started(name, 9, tmp_path, (place, count)) == -signal.SIGKILL, place
            assert place != "half written" or (tmp_path / ".run.pt.tmp").exists()
    assert started(name, 9, tmp_path) == 0
    expected = uninterrupted(JOBS[name], 9)
    assert difference(expected, result_in(tmp_path)) == ""
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


STEP_JOBS = ["textbook", "three_phases", "own_state", "own_steps", "counts"]
STEP_JOBS += ["averaged", "damped", "growing", "aggressive"]
STEP_JOBS += [*registered("E"), *registered("M"), *sampled()]


@pytest.mark.parametrize("name", STEP_JOBS)
def test_every_kind_of_half_step_killed_between_and_within_iterations(tmp_path, name):
    total = JOBS[name].total
    assert started(name, total, tmp_path, ("between E and M", 3)) == -signal.SIGKILL
    assert started(name, total, tmp_path, ("before an iteration", 2)) == -signal.SIGKILL
    assert started(name, total, tmp_path) == 0
    assert difference(never_killed(name), result_in(tmp_path)) == ""


@pytest.mark.parametrize(("name", "status"), [("converging", "CONVERGED"), ("to_be_accelerated", "CONVERGED")])
def test_what_the_stopping_rule_and_the_acceleration_remember_survives(tmp_path, name, status):
    total = JOBS[name].total
    assert started(name, total, tmp_path, ("between E and M", 8)) == -signal.SIGKILL
    assert started(name, total, tmp_path, ("before an iteration", 6)) == -signal.SIGKILL
    assert started(name, total, tmp_path) == 0
    assert difference(never_killed(name), result := result_in(tmp_path)) == ""
    assert result["status"][0] == status and result["status"][1] < total


SEARCH_KILLS = {  # while starts are screened, and while the best goes on
    "search": [
        *[("before one of all starts", count) for count in (7, 8)],
        *[("renamed", 2), ("half written", 3), ("before one of all starts", 9)],
    ],
    "search_svi": [("before an iteration", 17), ("renamed", 3), ("not yet renamed", 5)],
    "search_em": [("between E and M", 23), ("half written", 4), ("between E and M", 12)],
    "search_accelerated": [("between E and M", 40), ("renamed", 4), ("before an iteration", 8)],
    "search_loader": [("before an iteration", 8), ("renamed", 3), ("before an iteration", 4)],
}


@pytest.mark.parametrize("name", SEARCH_KILLS)
def test_a_search_killed_anywhere_is_the_search_that_was_not(tmp_path, name):
    total = SEARCHES[name].total
    for kill in SEARCH_KILLS[name]:
        assert started(name, total, tmp_path, kill) == -signal.SIGKILL, kill
    assert started(name, total, tmp_path) == 0
    assert difference(never_killed(name), result_in(tmp_path)) == ""


def test_killed_at_random_times(tmp_path):
    delays = (0.05, *(random.uniform(0.05, 0.4) for _ in range(3)))
    codes = [started("batch_norm_em", 60, tmp_path, delay=delay) for delay in delays]
    assert -signal.SIGKILL in codes
    assert started("batch_norm_em", 60, tmp_path) == 0
    expected = uninterrupted(JOBS["batch_norm_em"], 60)
    assert difference(expected, result_in(tmp_path)) == ""


def test_another_interpreter_goes_on(tmp_path):
    """The order of sets differs from interpreter to interpreter, and must not matter."""
    afresh(0)
    job = JOBS["batch_norm_em"]
    job.run(job.make(), 3, checkpoint=tmp_path / "run.pt")
    assert started("batch_norm_em", 5, tmp_path) == 0
    assert difference(never_killed("batch_norm_em"), result_in(tmp_path)) == ""


# What is not in order ---------------------------------------------------------------------------------------------


def stored(folder: Path, name: str = "svi", **options: Any) -> tuple[Any, Path]:
    """Run a job with a checkpoint and return what it made and the file."""
    afresh(0)
    fitter = JOBS[name].make()
    JOBS[name].run(fitter, checkpoint=folder / "run.pt", **options)
    return fitter, folder / "run.pt"


def everything(fitter: Any) -> dict[str, Any]:
    """What must not change where something is refused."""
    return {
        "leaves": {row.name: row.leaf.detach().clone() for row in fitter.blocks.rows},
        "optim": fitter.optim.get_state(),
        "generators": (torch.get_rng_state(), random.getstate(), np.random.get_state()),
        "steps": copy.deepcopy(fitter.engine.steps),
        "count": fitter.engine.count,
    }


def other_model(x: Tensor) -> None:
    theta = pyro.param("theta", torch.zeros(2))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(theta.sum(), 1.0))
        pyro.sample("x", dist.Normal(z, pyro.param("scale", torch.tensor(0.7))), obs=x)


def other_site(x: Tensor) -> None:
    chain(x)
    pyro.sample("prior", dist.Normal(0.0, 1.0), obs=pyro.param("theta"))


def other_constraint(x: Tensor) -> None:
    pyro.param("scale", torch.tensor(1.7), constraint=constraints.greater_than(1.0))
    chain(x)


def more_parameters(x: Tensor) -> None:
    chain(x)
    pyro.factor("more", pyro.param("bias", torch.tensor(0.1)))


def without_scale(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(0.0)), 1.0))
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


OTHERS = {
    "shape": (
        lambda: SVI(other_model, chain_guide, adam()),
        r"parameter 'theta'.*shape \[\].*in the file, shape \[2\]",
    ),
    "constraint": (
        lambda: SVI(other_constraint, chain_guide, adam()),
        r"parameter 'scale'.*GreaterThan\(lower_bound=1",
    ),
    "more": (lambda: SVI(more_parameters, chain_guide, adam()), r"parameter 'bias': none in the file"),
    "fewer": (lambda: SVI(without_scale, chain_guide, adam()), r"parameter 'scale': shape \[\].*, none here"),
    "site": (lambda: SVI(other_site, chain_guide, adam()), r"site 'prior': none in the file, observed here"),
    "optimizer": (
        lambda: SVI(chain, chain_guide, torch.optim.SGD),
        r"optimizer of 'slope' in block None: Adam in the file, SGD here",
    ),
    "scheduler": (JOBS["exponential"].make, r"Adam in the file, Adam with ExponentialLR here"),
    "loss": (lambda: SVI(chain, chain_guide, adam(), pyro.infer.Trace_ELBO()), r"loss: MonteCarloELBO in the file"),
    "objective": (
        lambda: SVI(chain, chain_guide, adam(), MonteCarloELBO(objective="iwae")),
        r"loss: MonteCarloELBO in the file, MonteCarloELBO, objective=IWAE\(",
    ),
    "half-step": (JOBS["em"].make, r"E-step: none in the file, Gradient here"),
    "float64": (
        lambda: SVI(lambda x: chain(x), doubled(chain_guide), adam()),
        r"parameter 'slope': shape \[\], torch.float32.*torch.float64",
    ),
}


def doubled(guide: Callable) -> Callable:
    def run(x: Tensor) -> None:
        pyro.param("slope", torch.tensor(0.1, dtype=torch.float64))
        guide(x)

    return run


@pytest.mark.parametrize("known", [False, True], ids=["new", "stepped"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_model_is_refused(tmp_path, name, known):
    _, path = stored(tmp_path)
    make, observed_value = OTHERS[name]
    afresh(3)
    other = make()
    if known:
        other.step(Y)
        before = everything(other)
    generators = torch.get_rng_state()
    with pytest.raises(CheckpointError, match=observed_value):
        JOBS["svi"].run(other, checkpoint=path)
    assert torch.equal(generators, torch.get_rng_state())
    if known:
        assert difference(before, everything(other)) == ""
        with pytest.raises(CheckpointError, match=observed_value):
            other.load(path)
        assert difference(before, everything(other)) == ""
    assert math.isfinite(other.step(Y))


def test_half_steps_of_another_kind_are_refused(tmp_path):
    _, path = stored(tmp_path, "textbook")
    afresh(1)
    with pytest.raises(CheckpointError, match="M-step: ClosedForm in the file, Gradient here"):
        JOBS["textbook"].run(JOBS["enumerated"].make(), checkpoint=path)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def damage(kind: str, path: Path) -> None:
    data = bytearray(path.read_bytes())
    content = torch.load(path, weights_only=True)
    if kind == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "flipped":
        place = data.index(content["state"]["params"]["theta"].numpy().tobytes())
        data[place] ^= 1
        path.write_bytes(data)
    elif kind == "format":
        torch.save(content | {"format": 99}, path)
    elif kind == "foreign":
        torch.save({"weight": torch.ones(2)}, path)
    elif kind == "tensor":
        torch.save(torch.ones(2), path)
    elif kind == "evil":
        torch.save(content | {"history": Evil(path.with_name("executed"))}, path)


@pytest.mark.parametrize(
    ("kind", "observed_value"),
    [
        ("truncated", r"\d+ bytes that are no checkpoint"),
        ("empty", "got 0 bytes that are no checkpoint"),
        ("flipped", "a wrong checksum of its part"),
        ("format", "got format 99.*reads format 1"),
        ("foreign", "got format None"),
        ("tensor", "got format None"),
        ("evil", "UnpicklingError"),
    ],
)
def test_a_damaged_file_is_refused_and_executes_nothing(tmp_path, kind, observed_value):
    svi, path = stored(tmp_path)
    svi.step(Y)
    before = everything(svi)
    damage(kind, path)
    for read in (svi.load, lambda path: JOBS["svi"].run(svi, checkpoint=path)):
        with pytest.raises(CheckpointError, match=observed_value):
            read(path)
    assert difference(before, everything(svi)) == ""
    assert not (tmp_path / "executed").exists()
    JOBS["svi"].run(svi, checkpoint=path, resume=False)
    assert checkpoint.read(path)["iteration"] == 5


@pytest.mark.parametrize(
    ("options", "observed_value"),
    [
        ({"checkpoint": "missing/run.pt"}, "missing, which is missing"),
        ({"checkpoint": "."}, "got a folder"),
        ({"checkpoint": 3}, "got 3"),
        ({"checkpoint": "none.pt", "resume": True}, "No such file"),
        ({"checkpoint": "run.pt", "resume": "always"}, "got 'always'"),
        ({"resume": True}, "got no path"),
        ({"checkpoint": "run.pt", "seed": 2}, "seed=2.*seed 1"),
    ],
)
def test_options_that_cannot_be(tmp_path, monkeypatch, options, observed_value):
    monkeypatch.chdir(tmp_path)
    svi, _ = stored(tmp_path, seed=1)
    before = everything(svi)
    with pytest.raises(CheckpointError, match=observed_value):
        JOBS["svi"].run(svi, **options)
    assert difference(before, everything(svi)) == ""


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    _, path = stored(tmp_path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(CheckpointError, match="No space left"):
        JOBS["svi"].run(JOBS["svi"].make(), 7, checkpoint=path)
    assert path.read_bytes() == before and [f.name for f in tmp_path.iterdir()] == ["run.pt"]


def test_what_cannot_be_stored_is_named(tmp_path):
    em = JOBS["own_state"].make()
    em.step(Y)
    em.engine.steps = {"E": {"z": torch.zeros(2), "move": [1, {"kernel": Walk()}]}}
    with pytest.raises(CheckpointError, match=r"the state\['steps'\]\['E'\]\['move'\]\[1\]\['kernel'\].*type Walk"):
        em.save(tmp_path / "em.pt")
    assert list(tmp_path.iterdir()) == []


def test_save_needs_a_step(tmp_path):
    with pytest.raises(StepError, match="no step yet"):
        JOBS["em"].make().save(tmp_path / "em.pt")


@pytest.mark.parametrize(
    ("name", "data", "observed_value"),
    [
        ("loader", lambda: {"data": seeded_loader()}, "loader with 1 generators of its own, a loader with 0"),
        ("seeded_loader", lambda: {"data": loader()}, "loader with 0 generators of its own, a loader with 1"),
        ("loader_with_state", lambda: {"data": loader()}, "loader with 0 generators of its own, a loader with a state"),
        ("batch_norm", lambda: {"data": [X]}, "loader with 0 generators of its own, arguments"),
    ],
)
def test_data_given_in_another_way_are_refused(tmp_path, name, data, observed_value):
    _, path = stored(tmp_path, name)
    afresh(1)
    fitter = JOBS[name].make()
    with pytest.raises(CheckpointError, match=observed_value):
        fitter.run(checkpoint=path, num_epochs=9, progress_bar=False, **data())


def test_an_iterator_cannot_be_peeked_into(tmp_path):
    _, path = stored(tmp_path, "loader")
    afresh(1)
    with pytest.raises(CheckpointError, match="iterator of type generator"):
        JOBS["loader"].make().run(data=(x for x in [X]), checkpoint=path, progress_bar=False)


# Meaning of the options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("every", "expected"), [(1, 7), (3, 3), (10, 1), (None, 7)])
def test_every(tmp_path, monkeypatch, every, expected):
    written = []
    monkeypatch.setattr(checkpoint.store, "write", lambda path, content: written.append(content["iteration"]))
    JOBS["svi"].run(JOBS["svi"].make(), 7, checkpoint=tmp_path / "run.pt", every=every)
    assert len(written) == expected and written[-1] == 7


def test_with_a_loader_between_epochs(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(
        checkpoint.store, "write", lambda path, content: written.append((content["epoch"], content["iteration"]))
    )
    JOBS["loader"].run(JOBS["loader"].make(), 3, checkpoint=tmp_path / "run.pt")
    assert written == [(1, 3), (2, 6), (3, 9)]


def test_resume_false_starts_anew_and_replaces(tmp_path):
    _, path = stored(tmp_path)
    afresh(0)
    svi = JOBS["svi"].make()
    fit = JOBS["svi"].run(svi, checkpoint=path, resume=False)
    assert "resumed_from" not in fit.provenance
    assert difference(never_killed("svi"), observed(JOBS["svi"], svi, fit)) == ""


def test_a_run_at_its_end_returns_its_fit(tmp_path):
    svi, path = stored(tmp_path)
    for fitter in (svi, JOBS["svi"].make()):
        fit = JOBS["svi"].run(fitter, checkpoint=path)
        assert difference(never_killed("svi"), observed(JOBS["svi"], fitter, fit)) == ""


def test_a_run_that_was_stopped_stays_so_and_one_that_was_interrupted_goes_on(tmp_path):
    stop = {"callbacks": lambda p: p.iteration == 1}
    for _ in range(2):
        fit = JOBS["svi"].run(JOBS["svi"].make(), checkpoint=tmp_path / "stopped.pt", **stop)
        assert (fit.status, fit.num_iterations) == ("STOPPED", 2)
    afresh(0)
    svi, path = JOBS["svi"].make(), tmp_path / "interrupted.pt"
    interrupt = {"callbacks": lambda p: p.iteration == 1 and os.kill(os.getpid(), signal.SIGINT)}
    fit = JOBS["svi"].run(svi, checkpoint=path, every=100, **interrupt)
    assert (fit.status, fit.num_iterations) == ("INTERRUPTED", 2)
    afresh(5)
    svi = JOBS["svi"].make()
    fit = JOBS["svi"].run(svi, checkpoint=path)
    assert difference(never_killed("svi"), observed(JOBS["svi"], svi, fit)) == ""


def test_seed_is_not_drawn_from_again(tmp_path):
    job, path = JOBS["svi"], tmp_path / "run.pt"
    whole = job.run(job.make(), seed=4)
    for total in (2, 5):
        afresh(total)
        fit = job.run(job.make(), total, checkpoint=path, seed=4)
    assert difference(whole.params, fit.params) == "" and fit.provenance["seed"] == 4


@pytest.mark.parametrize(
    ("before", "after", "observed_value"),
    [
        ("textbook", "accelerated", "history.iterate: none in the file, Squarem here"),
        ("accelerated", "textbook", "history.iterate: Squarem in the file, none here"),
        ("accelerated", "full_history", "history.iterate: Squarem in the file, FullHistory here"),
        ("by_hmc", "by_nuts", "E-step: MonteCarlo by HMC in the file, MonteCarlo by NUTS here"),
    ],
)
def test_another_way_to_iterate_is_refused(tmp_path, before, after, observed_value):
    _, path = stored(tmp_path, before)
    afresh(1)
    with pytest.raises(CheckpointError, match=observed_value):
        JOBS[after].run(JOBS[after].make(), checkpoint=path)


def test_what_is_tracked_from_later_on_is_unknown_before(tmp_path):
    job, path = JOBS["svi"], tmp_path / "run.pt"
    for total, names in ((3, ["theta", "scale"]), (5, ["theta", "slope"])):
        afresh(0)
        fit = job.run(job.make(), total, checkpoint=path, track=names)
    assert list(np.isnan(fit.history["param_slope"].values)) == [True] * 4 + [False] * 2
    assert np.isfinite(fit.history["param_theta"].values).all() and "param_scale" not in fit.history


def test_the_memory_of_a_users_rule_survives(tmp_path):
    class Counting:
        seen = 0

        def judge(self, objectives: list, **numbers: Any) -> convergence.Verdict:
            self.seen += 1
            return convergence.Verdict("CONVERGED" if self.seen == 4 else None)

        def state_dict(self) -> dict:
            return {"seen": self.seen}

        def load_state_dict(self, state: dict) -> None:
            self.seen = state["seen"]

    job = JOBS["svi"]
    fits = [job.run(job.make(), total, checkpoint=tmp_path / "run.pt", stop=Counting()) for total in (3, 9, 9)]
    assert [(fit.status, fit.num_iterations) for fit in fits] == [("MAX_ITER", 3)] + [("CONVERGED", 4)] * 2


def test_a_load_that_waits_is_the_first_iterate(tmp_path):
    svi, _ = stored(tmp_path)
    svi.save(path := tmp_path / "svi.pt")
    theta = pyro.param("theta").item()
    afresh(1)
    svi = JOBS["svi"].make()
    svi.load(path)
    assert float(JOBS["svi"].run(svi, track=["theta"]).history["param_theta"][0]) == theta


def test_the_clock_goes_on(tmp_path):
    _, path = stored(tmp_path)
    time.sleep(0.05)
    fit = JOBS["svi"].run(JOBS["svi"].make(), 7, checkpoint=path)
    seconds = fit.history["iteration_time"].values
    assert len(seconds) == 7 and (np.diff(seconds) > 0).all()


def test_a_failed_run_goes_on_from_its_last_checkpoint(tmp_path):
    job, path = JOBS["svi"], tmp_path / "run.pt"
    afresh(0)
    svi = job.make()
    job.run(svi, 2, checkpoint=path)
    with pytest.raises(NonFiniteError):
        svi.step(Y + 1e30)
    fit = job.run(svi, checkpoint=path)
    assert difference(never_killed("svi"), observed(job, svi, fit)) == ""


# save and load ----------------------------------------------------------------------------------------------------

SAVED = ["em", "batch_norm", "own_steps", "own_state", "exponential", "auto_flow", "graph_em", "textbook"]


@pytest.mark.parametrize("how", ["by data", "at the first step", "in place"])
@pytest.mark.parametrize("name", SAVED)
def test_save_and_load(tmp_path, name, how):
    job, path = JOBS[name], tmp_path / "em.pt"
    data = job.data()
    afresh(0)
    fitter = job.make()
    job.run(fitter, 3)
    fitter.save(path)
    expected = [fitter.step(data) for _ in range(3)], everything(fitter)
    if how != "in place":
        afresh(9)
        fitter = job.make()
    fitter.load(path, *([data] if how == "by data" else []))
    assert difference(expected, ([fitter.step(data) for _ in range(3)], everything(fitter))) == ""


@pytest.mark.parametrize("ask", [lambda em: em.evaluate_loss(Y), lambda em: em.posterior(Y).log_evidence])
def test_a_load_that_waits_is_seen_by_who_asks_first(tmp_path, ask):
    em, path = stored(tmp_path, "textbook")
    expected = ask(em)
    afresh(9)
    em = JOBS["textbook"].make()
    em.load(path)
    assert difference(expected, ask(em)) == ""


def test_a_load_that_waits_is_dropped_by_a_run_with_a_file_of_its_own(tmp_path):
    fitter, path = stored(tmp_path)
    fitter.step(Y + 5.0)
    fitter.save(tmp_path / "other.pt")
    afresh(2)
    fitter = JOBS["svi"].make()
    fitter.load(tmp_path / "other.pt")
    fit = JOBS["svi"].run(fitter, checkpoint=path)
    assert difference(never_killed("svi"), observed(JOBS["svi"], fitter, fit)) == ""


def test_a_file_of_save_is_gone_on_from_at_iteration_0(tmp_path):
    job = JOBS["svi"]
    afresh(0)
    svi = job.make()
    for _ in range(2):
        svi.step(Y)
    svi.save(tmp_path / "run.pt")
    afresh(1)
    svi = job.make()
    fit = job.run(svi, 3, checkpoint=tmp_path / "run.pt")
    assert fit.num_iterations == 3 and svi.engine.count == 5
    assert difference(never_killed("svi")["params"], fit.params) == ""


# What a checkpoint is made of -------------------------------------------------------------------------------------

VALUES = [
    [(0, 1.5, 2), (1, math.nan, 3)],
    [(0, 1.5), (1.0, 2)],
    [(1,), (2, 3)],
    [1, 2, 2**80],
    [0.1, math.inf, -0.0],
    [True, False],
    {"a": [np.ones(2), np.zeros(2)], "b": [np.ones(2), np.ones(3)], 3: None, (): "x"},
    [np.array(1.5), np.array(2.5)],
    np.arange(6, dtype=np.int8).reshape(2, 3),
    {"empty": [], "tuple": (1, (2.0, "s")), "size": torch.Size([2, 3])},
    Counter({3: 1}),
    [torch.ones(2), {"x": torch.tensor(True)}],
    torch.arange(6.0).reshape(2, 3).t(),
    torch.ones(1).expand(5),
]


@pytest.mark.parametrize("value", [v for v in VALUES if not (isinstance(v, dict) and () in v)], ids=repr)
def test_values_come_back_as_they_were(tmp_path, value):
    checkpoint.write(tmp_path / "x.pt", {"x": checkpoint.plain(value, "x")})
    back = checkpoint.decoded(torch.load(tmp_path / "x.pt", weights_only=True)["x"])
    assert type(back) is type(value) and difference(value, back) == ""
    assert repr(back) == repr(value)


def test_a_file_from_a_gpu_is_read_on_the_cpu(tmp_path):
    em, path = stored(tmp_path, "own_state")
    content = checkpoint.read(path)
    own = content["state"]["steps"]["E"]
    own["z"] = {"__elsewhere__": own["z"]}
    content["state"]["device"] = "cuda:0"
    content["rng"]["cuda"] = [torch.zeros(16, dtype=torch.uint8)]
    checkpoint.write(path, content)
    expected = [em.step(Y) for _ in range(2)], everything(em)
    afresh(1)
    em = JOBS["own_state"].make()
    em.load(path, Y)
    assert difference(expected, ([em.step(Y) for _ in range(2)], everything(em))) == ""


class Watch:
    """A part of a history that gives its state itself, as a stopping rule may."""

    def __init__(self) -> None:
        self.best, self.engine = 0.0, object()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]


def test_an_object_in_the_history_gives_its_state(tmp_path):
    svi, path = stored(tmp_path)
    fit = JOBS["svi"].run(svi, 6, checkpoint=path)
    fit.record.watch, again = Watch(), type(fit.record)()
    fit.record.watch.best, again.watch = 2.5, Watch()
    again.monitor = Monitor(svi.engine, None, None, False, [])
    checkpoint.write(path, checkpoint.pack(svi.engine, fit.record))
    checkpoint.content.restore_history(again, checkpoint.read(path))
    assert again.watch.best == 2.5 and difference(again.iterations, fit.record.iterations) == ""


def test_a_long_history_is_a_small_file(tmp_path):
    svi, path = stored(tmp_path)
    fit = JOBS["svi"].run(svi, 6, checkpoint=path)
    size = path.stat().st_size
    fit.record.steps *= 2000
    fit.record.iterations *= 2000
    start = time.perf_counter()
    checkpoint.write(path, checkpoint.pack(svi.engine, fit.record))
    checkpoint.read(path)
    assert time.perf_counter() - start < 1.0
    assert path.stat().st_size - size < 12_000 * 8 * 9 + 1000


def flat(content: dict) -> list:
    """The parameters that a windowed rule keeps, each as it is packed."""
    packed = content["history"]["objects"]["monitor"]["flat"]
    return packed if isinstance(packed, list) else [{"__array__": packed["__arrays__"]}]


# Each of these, left out, is noticed by the test of a run in parts.
DEFECTS = {
    "params": ("svi", lambda c: c["state"]["params"]["theta"].add_(1e-6)),
    "buffers": ("batch_norm", lambda c: [b.zero_() for b in c["state"]["buffers"]]),
    "slots": ("svi", lambda c: c["state"]["optim"]["None"]["theta"]["slots"]["exp_avg"].zero_()),
    "count": ("svi", lambda c: c["state"]["optim"]["None"]["theta"].update(count=0)),
    "options": ("exponential", lambda c: c["state"]["optim"]["None"]["theta"]["options"].update(lr=0.1)),
    "scheduler": ("multi_step", lambda c: c["state"]["optim"]["None"]["theta"]["scheduler"].update(last_epoch=0)),
    "estimator": ("decaying_average", lambda c: c["state"]["estimator"].clear()),
    "estimator of a half-step": ("own_steps", lambda c: c["state"]["estimator"].pop("E.loss")),
    "steps": ("own_state", lambda c: c["state"]["steps"]["E"]["z"].zero_()),
    "before": ("revert", lambda c: c["state"].update(before=None)),
    "torch": ("svi", lambda c: c["rng"].update(torch=torch.Generator().manual_seed(1).get_state())),
    "python": ("numpy_and_python", lambda c: c["rng"].update(python=random.Random(1).getstate())),
    "numpy": ("numpy_and_python", lambda c: c["rng"]["numpy"][1].add_(1)),
    "loader": ("seeded_loader", lambda c: c["rng"]["loader"][0].copy_(torch.Generator().manual_seed(1).get_state())),
    "history": ("em", lambda c: c["history"]["records"]["iterations"]["__rows__"][0].add_(1.0)),
    "rule": ("textbook", lambda c: c["history"]["objects"]["monitor"]["objectives"]["__numbers__"].sub_(1.0)),
    "iterate before": ("textbook", lambda c: c["history"]["objects"]["monitor"]["last"].clear()),
    "window": ("windowed", lambda c: [p["__array__"].zero_() for p in flat(c)]),
    "acceleration": ("accelerated", lambda c: c["history"]["objects"]["iterate"].update(longest=1.0)),
    "loss before": ("full_history", lambda c: c["history"]["objects"]["iterate"].update(last=math.nan)),
    "mode": ("counts", lambda c: c["state"]["steps"]["E"]["z"].add_(1.0)),
    "chains": ("by_hmc", lambda c: c["state"]["steps"]["E"]["position"].add_(1.0)),
    "iteration": ("em", lambda c: c.update(iteration=2)),
    "epoch": ("loader", lambda c: c.update(epoch=0)),
}


@pytest.mark.parametrize("left_out", DEFECTS)
def test_what_is_left_out_is_noticed(tmp_path, monkeypatch, left_out):
    name, spoil = DEFECTS[left_out]
    job, path, read = JOBS[name], tmp_path / "run.pt", checkpoint.read

    def spoiled(path: Path) -> dict[str, Any]:
        content = read(path)
        spoil(content)
        return content

    monkeypatch.setattr(checkpoint.store, "read", spoiled)
    for total in (job.total - 2, job.total):
        afresh(total)
        fitter = job.make()
        if total < job.total:
            afresh(0)
            fitter = job.make()
        fit = job.run(fitter, total, checkpoint=path)
    assert difference(never_killed(name), observed(job, fitter, fit)) != ""
