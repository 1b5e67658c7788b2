r"""`NeuralBaseline`: unbiased by construction (see test_estimators.py); here what it learns, and bad input."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_emvae import EstimatorError, MonteCarloELBO, compare_gradients
from pyro_emvae.estimators import NeuralBaseline

pytestmark = pytest.mark.filterwarnings("ignore:.compare_gradients. cannot tell signals:UserWarning")
X = torch.linspace(-3.0, 3.0, 20).unsqueeze(-1).repeat(1, 2)


def model(x: torch.Tensor) -> None:
    with pyro.plate("data", len(x)):
        b = pyro.sample("b", dist.Bernoulli(0.5))
        pyro.sample("x", dist.Normal(b.unsqueeze(-1), 0.5).to_event(1), obs=x)


def guide(x: torch.Tensor) -> None:
    weight = pyro.param("weight", torch.tensor(0.1))
    with pyro.plate("data", len(x)):
        pyro.sample("b", dist.Bernoulli(logits=weight * x.sum(-1)))


@pytest.mark.parametrize("objective", ["elbo", "iwae"])
def test_a_signal_that_the_data_foretell_is_foretold(objective):
    """log p(x | b) goes from -100 to 0 along the data: an average over them cannot know that."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    loss = MonteCarloELBO(2, estimator="neural_baseline", objective=objective)
    for _ in range(1500):
        loss.loss_and_grads(model, guide, X)
    rows = {"network": loss, "average": "decaying_average"}
    table = compare_gradients(model, guide, X, estimators=rows, objective=objective, num_replicates=400, seed=0)
    network, average = (float(table.dataset.variance_mean.sel(estimator=name, block="guide")) for name in rows)
    assert network < average / 3


def test_the_user_s_network_is_a_template():
    pyro.clear_param_store()
    network = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    before = [p.clone() for p in network.parameters()]
    estimator = NeuralBaseline(network, inputs=lambda particles: particles.observed["x"].value.sum(-1, keepdim=True))
    loss = MonteCarloELBO(1, estimator={"b": estimator})
    for _ in range(5):
        loss.loss_and_grads(model, guide, X)
    assert all(torch.equal(p, b) for p, b in zip(network.parameters(), before, strict=True))
    assert all(p.grad is None for p in network.parameters())
    moved = loss.state["b"]["network|0.weight"]
    assert moved.shape == (8, 1) and not torch.equal(moved, before[0])
    again = MonteCarloELBO(1, estimator={"b": estimator})
    again.load_state_dict(loss.state_dict())
    assert torch.equal(again.state["b"]["network|0.weight"], moved)


def test_a_network_of_the_wrong_width():
    pyro.clear_param_store()
    loss = MonteCarloELBO(1, estimator=NeuralBaseline(nn.Linear(2, 3)))
    with pytest.raises(
        EstimatorError, match=r"output of shape \(1, 20, 3\).*Let the network return shape \(1, 20, 1\)"
    ):
        loss.loss_and_grads(model, guide, X)
    assert loss.state == {}


def test_the_learning_rate():
    with pytest.raises(EstimatorError, match="learning_rate=0"):
        NeuralBaseline(learning_rate=0)
