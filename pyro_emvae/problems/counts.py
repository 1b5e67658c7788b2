r"""Counts of genes in single cells: negative binomial, with a library size per cell and effects of batches."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.distributions import constraints

from .._checks import EmvaeError, fail, positive_int
from ._problem import Maker

__all__ = ["CountEncoder", "Counts", "batch_effects", "count_model", "simulate_counts"]

SIZE, SIZE_SCALE, SIZE_SHIFT = 300.0, 0.4, 0.3
CONCENTRATION = 8.0
MANY_GENES = 200
PROFILE_SCALE, BATCH_SCALE, LOADING_SCALE = 0.8, 0.5, 0.5


@dataclass(frozen=True, eq=False)
class Counts:
    r"""Simulated counts and what they were simulated from.

    Args:
        x: Counts, ``(cells, genes)``.
        batch: The batch of each cell, ``(cells,)``.
        z: Latents, ``(cells, latents)``.
        size: Library sizes, ``(cells,)``: the expected number of counts of a cell.
        intercept: Log shares of the genes at z = 0, but for a constant, ``(batches, genes)``.
        loadings: What z adds to them, ``(latents, genes)``.
        concentration: Of the negative binomial, ``(genes,)``; the variance is mean + mean^2 / concentration.
    """

    x: Tensor = field(repr=False)
    batch: Tensor = field(repr=False)
    z: Tensor = field(repr=False)
    size: Tensor = field(repr=False)
    intercept: Tensor = field(repr=False)
    loadings: Tensor = field(repr=False)
    concentration: Tensor = field(repr=False)

    def __repr__(self) -> str:
        (cells, genes), batches = self.x.shape, len(self.intercept)
        zeros = float((self.x == 0).double().mean())
        return f"Counts({cells} cells, {genes} genes, {batches} batches, {zeros:.0%} zeros)"


def simulate_counts(
    num_cells: int = 2000,
    num_genes: int = 200,
    num_batches: int = 3,
    num_latents: int = 4,
    *,
    mean_size: float = SIZE,
    concentration: float = CONCENTRATION,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Counts:
    r"""Draw cells from the model of `count_model`, whose latents have nothing to do with the batch.

    Batches are drawn with equal probability; the median library size is that of the batch, which differ by factors of
    about 1.35. All draws are of the CPU's generator in float64 and of one seed; the global one stays as it is.

    Args:
        num_cells: Rows.
        num_genes: Columns.
        num_batches: Batches.
        num_latents: Dimension of z.
        mean_size: Median library size over the batches.
        concentration: Median over the genes.
        seed: Of all draws.
        dtype: Of what is returned.
        device: Of what is returned.

    Raises:
        EmvaeError: If a number is not a positive integer.

    Example:
        >>> from pyro_emvae.problems import simulate_counts
        >>> simulate_counts()
        Counts(2000 cells, 200 genes, 3 batches, 52% zeros)
    """
    sizes = {"cells": num_cells, "genes": num_genes, "batches": num_batches, "latents": num_latents}
    for name, value in sizes.items():
        positive_int("simulate_counts", f"num_{name}", value)
    make = Maker(seed, dtype, device)
    batch = torch.randint(num_batches, (num_cells,), generator=make.generator)
    z = make.noise(num_cells, num_latents)
    shift = SIZE_SHIFT * (torch.arange(num_batches) - (num_batches - 1) / 2)
    size = torch.exp(math.log(mean_size) + shift[batch] + SIZE_SCALE * make.noise(num_cells))
    profile = PROFILE_SCALE * make.noise(num_genes)
    intercept = profile + BATCH_SCALE * make.noise(num_batches, num_genes)
    loadings = LOADING_SCALE * make.noise(num_latents, num_genes)
    concentrations = concentration * torch.exp(0.5 * make.noise(num_genes))
    mean = size.unsqueeze(-1) * (intercept[batch] + z @ loadings).softmax(-1)
    x = _negative_binomial(mean, concentrations, int(torch.randint(2**31, (), generator=make.generator)))
    made = {"z": z, "size": size, "intercept": intercept, "loadings": loadings, "concentration": concentrations}
    return Counts(make(x), batch.to(device), **{name: make(value) for name, value in made.items()})


def _negative_binomial(mean: Tensor, concentration: Tensor, seed: int) -> Tensor:
    """Return draws of a generator of their own; the global one stays as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.poisson(torch.distributions.Gamma(concentration, concentration / mean).sample())


def count_model(
    num_cells: int,
    num_genes: int,
    num_batches: int,
    num_latents: int = 4,
    *,
    mean_size: float = SIZE,
    correct: bool = True,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Callable[..., None]:
    r"""Return a Pyro model of counts: ``model(x, batch, index=None)``.

    $$z_n\sim N(0,I),\quad \log\ell_n\sim N(m_{b_n},s^2),\quad a_{bg}\sim N(c_g,\tau^2),$$
    $$\rho_{n\cdot}=\mathrm{softmax}(a_{b_n\cdot}+z_n^\top W),\qquad x_{ng}\sim\mathrm{NB}(\text{mean }\ell_n\rho_{ng},\
    \text{concentration }r_g).$$

    Latents: ``intercept`` (a), which all cells share; in the plate ``cells`` ``z`` and ``size`` ($\ell$). Parameters:
    ``loadings`` (W), ``profile`` (c), ``concentration`` (r), ``size_loc`` (m), ``size_scale`` (s), ``batch_scale``
    ($\tau$). A minibatch x counts ``num_cells / len(x)`` times; ``index`` says which rows of the data it holds.

    The softmax does not see a constant added to a batch's intercepts: compare `batch_effects`.

    Args:
        num_cells: The size of the plate.
        num_genes: Columns of x.
        num_batches: Batches; ``batch`` holds their numbers.
        num_latents: Dimension of z.
        mean_size: A first guess of the library sizes.
        correct: Whether each batch has intercepts and a median library size of its own; if not, ``batch`` is ignored.
        dtype: Of the parameters.
        device: Of the parameters.

    Source: Lopez et al. 2018, "Deep generative modeling for single-cell transcriptomics"; Svensson et al. 2020,
    "Interpretable factor models of single-cell RNA-seq via variational autoencoders", for the linear decoder. Differs:
    the intercepts of the batches are latents, with a prior, so that they have posterior intervals.

    Example:
        >>> from pyro_emvae.problems import count_model, simulate_counts
        >>> data = simulate_counts(num_cells=50, num_genes=7)
        >>> model = count_model(num_cells=50, num_genes=7, num_batches=3)
        >>> trace = pyro.poutine.trace(model).get_trace(data.x[:20], data.batch[:20])
        >>> trace.nodes["x"]["scale"], list(trace.stochastic_nodes)
        (2.5, ['intercept', 'cells', 'z', 'size'])
    """
    options = {"dtype": dtype, "device": device}
    rows = num_batches if correct else 1
    generator = torch.Generator().manual_seed(num_genes)
    first = {
        "loadings": 0.1 * torch.randn(num_latents, num_genes, generator=generator, dtype=torch.float64).to(**options),
        "profile": torch.zeros(num_genes, **options),
        "size_loc": torch.full((rows,), math.log(mean_size), **options),
        "concentration": torch.ones(num_genes, **options),
        "size_scale": torch.tensor(0.5, **options),
        "batch_scale": torch.tensor(0.5, **options),
    }
    positive = ("concentration", "size_scale", "batch_scale")
    zero = torch.zeros(num_latents, **options)

    def param(name: str) -> Tensor:
        return pyro.param(
            name, first[name].clone, constraint=constraints.positive if name in positive else constraints.real
        )

    def model(x: Tensor, batch: Tensor, index: Tensor | None = None) -> None:
        batch = batch if correct else torch.zeros_like(batch)
        index = torch.arange(len(x), device=x.device) if index is None else index
        profile, size_loc = param("profile").expand(rows, -1), param("size_loc")
        intercept = pyro.sample("intercept", dist.Normal(profile, param("batch_scale")).to_event(2))
        with pyro.plate("cells", num_cells, subsample=index, dim=-1, device=x.device):
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            size = pyro.sample("size", dist.LogNormal(size_loc[batch], param("size_scale")))
            logits = _of_rows(intercept, batch) + z @ param("loadings")
            mean = size.unsqueeze(-1) * logits.softmax(-1)
            concentration = param("concentration")
            pyro.sample("x", dist.GammaPoisson(concentration, concentration / mean).to_event(1), obs=x)

    return model


def _of_rows(intercept: Tensor, batch: Tensor) -> Tensor:
    """Return each cell's intercepts; the plate's dim takes the place that a particle plate has left free for it."""
    rows = intercept[..., batch, :]
    return rows if rows.dim() == 2 else rows.squeeze(-3)


class CountEncoder(nn.Module):
    r"""Counts and batch to the contexts of z and of the library size: linear, plus a layer of SiLU units.

    It reads log1p of the counts at a common library size, each gene standardised by the first data, the logarithm of
    the cell's total, and the batch. More than 200 genes are scaled down by their number, for a step of Adam moves every
    weight as much, and the output by their sum. At the start the location of ``size`` is the total's logarithm, and all
    else 0.

    When to use: as ``encoder=`` of `AutoAmortized`, with ``encoder_input=lambda x, batch, index=None: (x, batch)``.

    Args:
        x: Some of the data, ``(cells, genes)``.
        num_batches: Batches.
        columns: Columns of z's context; the two of ``size`` follow them.
        width: Of the hidden layer.

    Shape: ``(cells, genes)``, ``(cells,)`` -> ``(cells, columns + 2)``.

    Example:
        >>> encoder = CountEncoder(torch.poisson(torch.full((50, 7), 2.0)), num_batches=3, columns=8)
        >>> encoder(torch.full((2, 7), 3.0), torch.tensor([0, 2]))[:, 8].exp().round().tolist()
        [22.0, 22.0]
    """

    def __init__(self, x: Tensor, num_batches: int, columns: int, width: int = 128) -> None:
        super().__init__()
        options = {"dtype": x.dtype, "device": x.device}
        inputs = x.shape[-1] + 1 + num_batches
        totals = (1 + x.sum(-1)).log()
        self.register_buffer("centre", totals.mean())
        shares = self._shares(x)
        self.register_buffer("loc", shares.mean(0))
        self.register_buffer("scale", shares.std(0).clamp(min=0.1) * max(1.0, x.shape[-1] / MANY_GENES))
        self.register_buffer("batches", torch.eye(num_batches, **options))
        self.linear = nn.Linear(inputs, columns + 2, **options)
        layers = [nn.Linear(inputs, width, **options), nn.SiLU(), nn.Linear(width, columns + 2, **options)]
        self.layers = nn.Sequential(*layers)
        with torch.no_grad():
            for parameter in (*self.linear.parameters(), *layers[-1].parameters()):
                parameter.zero_()
            self.linear.weight[columns, x.shape[-1]] = 0.5
            self.linear.bias[columns] = self.centre

    def forward(self, x: Tensor, batch: Tensor) -> Tensor:
        total = 2 * ((1 + x.sum(-1, keepdim=True)).log() - self.centre)
        read = torch.cat([(self._shares(x) - self.loc) / self.scale, total, self.batches[batch]], -1)
        return self.linear(read) + self.layers(read)

    def _shares(self, x: Tensor) -> Tensor:
        return torch.log1p(x * (self.centre.exp() / (1 + x.sum(-1, keepdim=True))))


def batch_effects(intercept: Tensor, loadings: Tensor, z: Tensor, batch: Tensor) -> Tensor:
    r"""Return how much more of each gene the batches after the first have, between their average cells.

    $$e_{bg}=u_{bg}-u_{0g},\qquad u_{b\cdot}=a_{b\cdot}+\bar z_b^\top W\ \text{less its mean over the genes}.$$

    The intercepts alone are known up to a constant, and up to the mean of z in a batch, which the data do not tell from
    an effect; this difference is free of both.

    Args:
        intercept: a, ``(..., batches, genes)``.
        loadings: W, ``(latents, genes)``.
        z: Latents, ``(..., cells, latents)``.
        batch: Of each cell, ``(cells,)``.

    Shape: ``(..., batches - 1, genes)``, in logarithms of shares.

    Raises:
        EmvaeError: If a batch has no cell.

    Example:
        >>> a, w, z = torch.tensor([[0.0, 0.0], [1.0, 0.0]]), torch.zeros(3, 2), torch.zeros(4, 3)
        >>> batch_effects(a, w, z, torch.tensor([0, 1, 1, 0]))
        tensor([[ 0.5000, -0.5000]])
    """
    number = torch.bincount(batch, minlength=intercept.shape[-2])
    if bool((number == 0).any()):
        fail(
            EmvaeError,
            "batch_effects",
            "compare the batches",
            got=f"{number.tolist()} cells per batch",
            because="an effect lies between the average cells of two batches",
            fix="Leave out the batches that have no cells.",
        )
    members = torch.nn.functional.one_hot(batch, len(number)).T.to(z.dtype) / number.unsqueeze(-1)
    level = intercept + members @ z @ loadings
    level = level - level.mean(-1, keepdim=True)
    return level[..., 1:, :] - level[..., :1, :]
