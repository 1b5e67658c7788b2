r"""Gradient variances of Bayesian logistic regression along training, by hand: the reference of `estimators`.

    python -m benchmarks.breast_cancer [--samples 200000]

writes ``benchmarks/breast_cancer.json``: the parameters at steps 0, 200, 1000 and 5000 of the training that Mohamed et
al. describe, and there the variance of one sample's gradient of the expected log likelihood (the KL is closed-form and
adds none), mean over the 31 coordinates. Nothing of the package is used but the data.

Source: Mohamed, Rosca, Figurnov and Mnih 2020, section 8. 569 data, 30 standardised features and a one; prior N(0, I);
diagonal normal q from mean 0 and log scale 0; minus 569 times a batch's mean log likelihood (32 data, 50 draws) plus
KL; plain SGD, learning rate 1e-3 cos(pi t / 2 T), T = 5000.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_emvae import problems

PATH = Path(__file__).with_name("breast_cancer.json")
STEPS = (0, 200, 1000, 5000)
BATCH, DRAWS, RATE = 32, 50, 1e-3


def data() -> tuple[Tensor, Tensor]:
    """Features ``(569, 31)`` and labels, float64."""
    x, y = problems.logistic_regression().args
    return x, y


def log_likelihood(w: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sum over data of log p(y | x, w): ``(*draws,)``."""
    logits = w @ x.T
    return logits @ y - softplus(logits).sum(-1)


def train(x: Tensor, y: Tensor, seed: int = 0) -> dict[int, tuple[Tensor, Tensor]]:
    """Return mean and log scale at each of the steps."""
    generator = torch.Generator().manual_seed(seed)
    loc, log_scale = (torch.zeros(x.shape[1], dtype=x.dtype, requires_grad=True) for _ in range(2))
    found = {0: (loc.detach().clone(), log_scale.detach().clone())}
    for step in range(max(STEPS)):
        rows = torch.randperm(len(x), generator=generator)[:BATCH]
        w = loc + log_scale.exp() * torch.randn(DRAWS, len(loc), generator=generator, dtype=x.dtype)
        kl = 0.5 * ((2 * log_scale).exp() + loc**2 - 1 - 2 * log_scale).sum()
        loss = kl - len(x) / BATCH * log_likelihood(w, x[rows], y[rows]).mean()
        grads = torch.autograd.grad(loss, (loc, log_scale))
        rate = RATE * math.cos(math.pi * step / (2 * max(STEPS)))
        with torch.no_grad():
            for leaf, grad in zip((loc, log_scale), grads, strict=True):
                leaf -= rate * grad
        if step + 1 in STEPS:
            found[step + 1] = loc.detach().clone(), log_scale.detach().clone()
    return found


class Moments:
    """Running sums of gradients and of their squares, per coordinate."""

    def __init__(self) -> None:
        self.count, self.first, self.second = 0, 0.0, 0.0

    def add(self, g: Tensor) -> None:
        self.count += len(g)
        self.first, self.second = self.first + g.sum(0), self.second + (g**2).sum(0)

    @property
    def variance(self) -> Tensor:
        return (self.second - self.first**2 / self.count) / (self.count - 1)


def draws(loc: Tensor, log_scale: Tensor, samples: int, seed: int, chunk: int = 1000) -> Iterator[tuple]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(samples // chunk):
        eps = torch.randn(chunk, len(loc), generator=generator, dtype=loc.dtype)
        yield loc + log_scale.exp() * eps, eps, generator


def score_and_pathwise(loc: Tensor, log_scale: Tensor, x: Tensor, y: Tensor, samples: int) -> dict[str, list[float]]:
    """Variances of the score function, of it less the exact mean of f (leave-one-out of many), and of pathwise."""
    scale, rows = log_scale.exp(), {name: Moments() for name in ("score", "leave_one_out", "pathwise")}
    mean = torch.cat([log_likelihood(w, x, y) for w, _, _ in draws(loc, log_scale, samples, seed=1)]).mean()
    for w, eps, _ in draws(loc, log_scale, samples, seed=2):
        f = log_likelihood(w, x, y)[:, None]
        score = torch.cat([eps / scale, eps**2 - 1], 1)
        slope = (y - torch.sigmoid(w @ x.T)) @ x
        rows["score"].add(f * score)
        rows["leave_one_out"].add((f - mean) * score)
        rows["pathwise"].add(torch.cat([slope, slope * scale * eps], 1))
    return {name: by_parameter(moments) for name, moments in rows.items()}


def measure_valued(loc: Tensor, log_scale: Tensor, x: Tensor, y: Tensor, samples: int) -> list[float]:
    """Variance of coupled measure-valued derivatives: four evaluations per coordinate on one draw of the others."""
    scale, moments = log_scale.exp(), Moments()
    for w, _, generator in draws(loc, log_scale, samples, seed=3):
        logits, size = w @ x.T, w.shape
        rayleigh = (-2 * torch.rand(size, generator=generator, dtype=w.dtype).log()).sqrt()
        length = torch.randn(3, *size, generator=generator, dtype=w.dtype).norm(dim=0)
        maxwell = torch.where(torch.rand(size, generator=generator) < 0.5, -length, length)
        shrunk = maxwell * torch.rand(size, generator=generator, dtype=w.dtype)
        columns: list[Tensor] = []
        for place, weight in (((rayleigh, -rayleigh), 1 / (scale * math.sqrt(2 * math.pi))), ((maxwell, shrunk), None)):
            for d in range(size[1]):
                plus, minus = (at[:, d] * scale[d] + loc[d] - w[:, d] for at in place)
                difference = (plus - minus) * (x[:, d] @ y) - _change(logits, x[:, d], plus, minus)
                columns.append(difference if weight is None else weight[d] * difference)
        moments.add(torch.stack(columns, 1))
    return by_parameter(moments)


def _change(logits: Tensor, column: Tensor, plus: Tensor, minus: Tensor) -> Tensor:
    one = softplus(logits + plus[:, None] * column).sum(1)
    return one - softplus(logits + minus[:, None] * column).sum(1)


def by_parameter(moments: Moments) -> list[float]:
    """Return the mean variance over the coordinates of the mean, and of the log scale."""
    return [float(part.mean()) for part in moments.variance.chunk(2)]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.breast_cancer", description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200_000)
    samples = parser.parse_args().samples
    x, y = data()
    stages = {}
    for step, (loc, log_scale) in train(x, y).items():
        variances = score_and_pathwise(loc, log_scale, x, y, samples)
        variances["measure_valued"] = measure_valued(loc, log_scale, x, y, samples // 2)
        stages[step] = {"loc": loc.tolist(), "log_scale": log_scale.tolist(), "variance": variances}
        print(step, {name: [f"{v:.4g}" for v in pair] for name, pair in variances.items()}, flush=True)
    made = {"command": f"python -m benchmarks.breast_cancer --samples {samples}", "torch": torch.__version__}
    made |= {"samples": samples, "samples of measure_valued": samples // 2, "stages": stages}
    PATH.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
