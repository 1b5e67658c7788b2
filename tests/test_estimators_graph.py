r"""A recorded step of each estimator is the eager one, on vectors of bits, one-hot values and categories in a plate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import pyro_emvae as emvae
from pyro_emvae._registry import create, entries

F64 = torch.float64
X = torch.tensor([[0.3, -1.2], [2.0, 0.4], [-0.6, 0.9]], dtype=F64)


def bits(logits: Tensor) -> Any:
    return dist.Bernoulli(logits=logits).to_event(1)


def one_hot(logits: Tensor) -> Any:
    return dist.OneHotCategorical(logits=logits)


def category(logits: Tensor) -> Any:
    return dist.Categorical(logits=logits)


def pair(make: Callable[[Tensor], Any]) -> tuple[Callable, Callable]:
    """A model with a second, pathwise latent below the discrete one, so that values downstream are drawn anew."""
    weights = torch.tensor([[0.5, -1.0], [1.5, 0.2], [-0.7, 0.8], [0.1, 1.1]], dtype=F64)

    def embed(z: Tensor) -> Tensor:
        w = pyro.param("weights", weights.clone)
        return w[z] if make is category else torch.tanh(z @ w)

    def model(x: Tensor) -> None:
        prior = pyro.param("prior", lambda: torch.linspace(-0.5, 0.5, 4, dtype=F64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", make(prior))
            u = pyro.sample("u", dist.Normal(embed(z), 0.8).to_event(1))
            pyro.sample("x", dist.Normal(u, 0.5).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        logits = pyro.param("logits", lambda: torch.linspace(-1, 1, 12, dtype=F64).reshape(3, 4))
        scale = pyro.param("scale", lambda: torch.tensor(0.3, dtype=F64), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", make(logits))
            shift = pyro.param("shift", lambda: torch.tensor(0.6, dtype=F64)) * embed(z)
            pyro.sample("u", dist.Normal(0.5 * x + shift, scale).to_event(1))

    def alone(x: Tensor) -> None:
        logits = pyro.param("logits", lambda: torch.linspace(-1, 1, 12, dtype=F64).reshape(3, 4))
        scale = pyro.param("scale", lambda: torch.tensor(0.3, dtype=F64), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", make(logits))
            pyro.sample("u", dist.Normal(0.5 * x, scale).to_event(1))

    return model, alone if make is not bits else guide


def steps(estimator: Any, make: Callable, backend: str) -> tuple[list[float], dict[str, Tensor], Any]:
    pyro.clear_param_store()
    pyro.set_rng_seed(4)
    count = max(2, estimator.traits.min_particles)
    loss = emvae.MonteCarloELBO(count, 1, vectorize_particles=True, estimator={"z": estimator, "u": "pathwise"})
    svi = emvae.SVI(*pair(make), pyro.optim.Adam({"lr": 0.05}), loss, backend=backend)
    losses = [svi.step(X) for _ in range(5)]
    return losses, {name: value.detach().clone() for name, value in pyro.get_param_store().items()}, svi


def cases() -> list[Any]:
    found = []
    for entry in entries("estimator"):
        if entry.traits.arguments or not entry.traits.recordable or entry.traits.needs_rsample:
            continue
        for make in (bits, one_hot, category):
            if make is bits or entry.traits.support != "binary":
                found.append(pytest.param(entry.name, make, id=f"{entry.name}-{make.__name__}"))
    return found


@pytest.mark.parametrize(("name", "make"), cases())
def test_a_recorded_step_is_the_eager_one(name, make):
    estimator = create("estimator", name)
    try:
        losses, params, _ = steps(estimator, make, "eager")
    except emvae.EmvaeError as error:  # it does not fit such a site, and says what does
        assert "Use" in str(error) or "Write" in str(error) or "Draw" in str(error)
        return
    recorded, others, svi = steps(estimator, make, "graph")
    assert svi.engine._recordings, "nothing was recorded"
    assert recorded == pytest.approx(losses, rel=1e-11)
    for key, value in params.items():
        torch.testing.assert_close(others[key], value, rtol=1e-10, atol=1e-12)
    moved = "logits" if name != "enumerated" else "weights"
    assert not torch.equal(params[moved].flatten(), torch.linspace(-1, 1, params[moved].numel(), dtype=F64))


def test_most_estimators_are_compared():
    """Those that fit: an error would otherwise hide that nothing is looked at."""
    fitting = {}
    for make in (bits, one_hot, category):
        for entry in entries("estimator"):
            if not entry.traits.arguments and entry.traits.recordable and not entry.traits.needs_rsample:
                loss = emvae.MonteCarloELBO(
                    max(2, entry.traits.min_particles),
                    1,
                    vectorize_particles=True,
                    estimator={"z": entry.factory(), "u": "pathwise"},
                )
                pyro.clear_param_store()
                try:
                    loss.prepare(*pair(make), (X,), {})
                except emvae.EmvaeError:
                    continue
                fitting.setdefault(make.__name__, set()).add(entry.name)
    relaxed = {"gumbel_softmax", "straight_through", "gumbel_rao", "reinmax"}
    assert relaxed | {"rebar", "relax", "arms", "score"} <= fitting["bits"]
    assert relaxed | {"leave_one_out"} <= fitting["one_hot"]
    assert {"rao_blackwell_topk", "unordered_set", "enumerated", "leave_one_out"} <= fitting["category"]
