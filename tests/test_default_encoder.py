r"""The encoder that `AutoAmortized` makes by itself, against the best of several made and tuned by hand."""

from __future__ import annotations

import itertools

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pyro_emvae as emvae
from pyro_emvae.guides import AutoAmortized

pytestmark = pytest.mark.slow

STEPS, BATCH = 1500, 200


def network(*widths: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    pairs = itertools.pairwise(widths)
    layers = [module for a, b in pairs for module in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers[:-1])


class Prepared(nn.Module):
    """A network behind a fixed function of the data."""

    def __init__(self, prepare, net: nn.Module) -> None:
        super().__init__()
        self.prepare, self.net = prepare, net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.prepare(x))


def digits():
    """Black and white digits, three latents; encoders on pixels of 0 and 1, or of -1 and 1."""
    data = emvae.problems.load_digits_binary(num_train=1400)
    decoder = network(3, 100, 64, act=nn.Tanh)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    by_hand = [
        network(64, 100, 6, act=nn.Tanh),
        Prepared(lambda x: 2 * x - 1, network(64, 200, 200, 6)),
        Prepared(lambda x: 2 * x - 1, network(64, 400, 6, act=nn.SiLU)),
    ]
    return model, data.train.float(), data.test.float(), by_hand


def counts():
    """Negative binomial counts of 60 genes, five latents and a library size; encoders on logarithms and shares."""
    generator = torch.Generator().manual_seed(0)
    loadings = torch.randn(5, 60, generator=generator)
    z = torch.randn(1500, 5, generator=generator)
    size = torch.exp(6.0 + 0.5 * torch.randn(1500, 1, generator=generator))
    torch.manual_seed(0)
    mean = size * (z @ loadings).softmax(-1)
    x = dist.GammaPoisson(3.0, 3.0 / mean).sample()
    decoder = network(5, 100, 60)

    def model(x):
        pyro.module("decoder", decoder)
        shape = pyro.param("shape", torch.tensor(1.0), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
            size = pyro.sample("size", dist.LogNormal(6.0, 1.0)).unsqueeze(-1)
            mean = size * decoder(z).softmax(-1) + 1e-4
            pyro.sample("x", dist.GammaPoisson(shape, shape / mean).to_event(1), obs=x)

    def shares(x):
        total = x.sum(-1, keepdim=True) + 1
        return torch.cat([torch.log1p(400 * x / total), total.log() - 6], -1)

    by_hand = [
        Prepared(lambda x: torch.log1p(x) - 1, network(60, 128, 128, 12)),
        Prepared(shares, network(61, 128, 12)),
        Prepared(shares, network(61, 256, 256, 12)),
    ]
    return model, x[:1200], x[1200:], by_hand


def fitted(problem, which: int | None, lr: float) -> float:
    """Return the held-out ELBO per datum after a fit with an encoder made by hand, or with the default one."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, train, test, by_hand = problem()
    guide = AutoAmortized(model, None if which is None else by_hand[which])
    optim = pyro.optim.ClippedAdam({"lr": lr, "lrd": 0.1 ** (1 / STEPS)})
    svi = emvae.SVI(model, guide, optim, backend="graph")
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        svi.step(train[torch.randperm(len(train), generator=generator)[:BATCH]])
    return emvae.elbo(model, guide, test, num_particles=100, seed=0).value / len(test)


@pytest.mark.parametrize("problem", [digits, counts])
def test_default_encoder_against_tuned_ones(problem, record_result):
    """The default one at one learning rate; three by hand, each at two."""
    tuned = {(i, lr): fitted(problem, i, lr) for i in range(3) for lr in (1e-3, 4e-3)}
    default = fitted(problem, None, 2e-3)
    best, worst = max(tuned.values()), min(tuned.values())
    record_result(
        f"held-out ELBO per datum of {problem.__name__}: default encoder against the best (worst) of six tuned by hand",
        f"{default:.2f} against {best:.2f} ({worst:.2f}) nats",
    )
    assert default > best - 2.0
