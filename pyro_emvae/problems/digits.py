r"""A variational autoencoder for the 8x8 digits that scikit-learn ships."""

from __future__ import annotations

from dataclasses import dataclass, field

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn

from .._checks import EmvaeError, fail, nearest, positive_int
from ._problem import Maker, Problem, ProblemTraits, problem
from .regression import sklearn_datasets

__all__ = ["Decoder", "Digits", "Encoder", "binarized", "digits_vae", "load_digits_binary"]

PIXELS = 64
WEIGHT_SCALE = 0.1
BINARIZE = ("threshold", "stochastic")


@dataclass(frozen=True, eq=False)
class Digits:
    """Binary images, one per row of zeros and ones, and the digits that they show."""

    train: Tensor = field(repr=False)
    test: Tensor = field(repr=False)
    train_labels: Tensor = field(repr=False)
    test_labels: Tensor = field(repr=False)
    num_train: int = 0
    num_test: int = 0


def load_digits_binary(
    num_train: int = 1000,
    *,
    binarize: str = "threshold",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Digits:
    r"""Return the 1,797 8x8 digits of scikit-learn as binary images, split at random into training and test data.

    Args:
        num_train: The number of training images; the others are for testing.
        binarize: ``"threshold"`` (grey value above 8 of 16) or ``"stochastic"`` (Bernoulli with the grey value as
            probability, drawn once).
        seed: Of the split and of the stochastic binarization.
        dtype: Of the images.
        device: Of images and labels.

    Raises:
        EmvaeError: If scikit-learn is not installed, ``binarize`` is unknown, or no image is left for testing.

    Example:
        >>> from pyro_emvae.problems import load_digits_binary
        >>> digits = load_digits_binary()
        >>> digits
        Digits(num_train=1000, num_test=797)
        >>> digits.train.unique().tolist()
        [0.0, 1.0]
    """
    grey, labels = (torch.as_tensor(a) for a in sklearn_datasets("load_digits_binary").load_digits(return_X_y=True))
    _check_split(num_train, len(grey))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(grey), generator=generator)
    level = binarized("load_digits_binary", grey.double() / 16, binarize, generator)
    images = level[order].to(device, dtype)
    labels = labels[order].to(device)
    return Digits(
        train=images[:num_train],
        test=images[num_train:],
        train_labels=labels[:num_train],
        test_labels=labels[num_train:],
        num_train=num_train,
        num_test=len(grey) - num_train,
    )


def binarized(obj: str, level: Tensor, binarize: str, generator: torch.Generator) -> Tensor:
    """Return which grey levels between 0 and 1 lie above one half, or above uniform random numbers."""
    if binarize not in BINARIZE:
        fail(
            EmvaeError,
            obj,
            f"binarize by {binarize!r}",
            got="an unknown name",
            because="there are two ways",
            fix=nearest(binarize, BINARIZE),
        )
    return level > (
        torch.rand(level.shape, generator=generator, dtype=level.dtype) if binarize == "stochastic" else 0.5
    )


def _check_split(num_train: int, total: int) -> None:
    if positive_int("load_digits_binary", "num_train", num_train) >= total:
        fail(
            EmvaeError,
            "load_digits_binary",
            "split the images",
            got=f"num_train={num_train}",
            because=f"there are {total} images and some have to be left for testing",
            fix=f"Write num_train={total // 2}, or any number below {total}.",
        )


class Encoder(nn.Module):
    """Images to the location and scale of the latents: one hidden layer with tanh."""

    def __init__(self, num_latents: int, num_hidden: int) -> None:
        super().__init__()
        self.hidden = nn.utils.skip_init(nn.Linear, PIXELS, num_hidden)
        self.loc = nn.utils.skip_init(nn.Linear, num_hidden, num_latents)
        self.log_scale = nn.utils.skip_init(nn.Linear, num_hidden, num_latents)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(x).tanh()
        return self.loc(hidden), self.log_scale(hidden).exp()


class Decoder(nn.Module):
    """Latents to the logits of the pixels: one hidden layer with tanh."""

    def __init__(self, num_latents: int, num_hidden: int) -> None:
        super().__init__()
        self.hidden = nn.utils.skip_init(nn.Linear, num_latents, num_hidden)
        self.logits = nn.utils.skip_init(nn.Linear, num_hidden, PIXELS)

    def forward(self, z: Tensor) -> Tensor:
        return self.logits(self.hidden(z).tanh())


def digits_vae(
    *,
    num_train: int = 1000,
    num_latents: int = 3,
    num_hidden: int = 100,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
) -> Problem:
    r"""$z_n\sim N(0,I)$, $x_n\sim\mathrm{Bern}(f_\theta(z_n))$, guide $N(m_\phi(x_n),\mathrm{diag}(s_\phi(x_n)^2))$.

    ``model(x, index=None)`` and ``guide(x, index=None)`` take any batch of images; the plate has the size of the
    training set, so a batch of B counts ``num_train / B`` times. ``index`` says which rows of the training set it
    holds, for steps that keep something per datum. The parameters live in two modules, so that clearing the param
    store does not reset them: make a new problem for a fresh start.

    Args:
        num_train: The number of training images, which are ``args[0]``.
        num_latents: Dimension of z.
        num_hidden: Width of the one hidden layer of either network.
        seed: Of the split and of the initial weights, which are $N(0, 0.01)$.
        dtype: Of data and parameters.
        device: Of data and parameters.

    Source: Kingma and Welling 2013, section 5 and figure 3 (100 hidden units, 3 latents, 1,000 data). Differs: 8x8
    digits instead of MNIST, Bernoulli logits, no prior on the weights.

    Example:
        >>> from pyro_emvae.problems import digits_vae
        >>> problem = digits_vae()
        >>> tuple(problem.args[0].shape), problem.model_params[0], len(problem.guide_params)
        ((1000, 64), 'decoder$$$hidden.weight', 6)
    """
    make = Maker(seed, dtype, device)
    x = load_digits_binary(num_train, seed=seed, dtype=dtype, device=device).train
    decoder = _fill(Decoder(num_latents, num_hidden), make)
    encoder = _fill(Encoder(num_latents, num_hidden), make)
    zero, one = make([0.0] * num_latents), make([1.0] * num_latents)

    def plate(x: Tensor, index: Tensor | None) -> pyro.plate:
        rows = torch.arange(len(x), device=x.device) if index is None else index
        return pyro.plate("data", num_train, subsample=rows, dim=-1, device=x.device)

    def model(x: Tensor, index: Tensor | None = None) -> None:
        pyro.module("decoder", decoder)
        with plate(x, index):
            z = pyro.sample("z", dist.Normal(zero, one).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x: Tensor, index: Tensor | None = None) -> None:
        pyro.module("encoder", encoder)
        loc, scale = encoder(x)
        with plate(x, index):
            pyro.sample("z", dist.Normal(loc, scale).to_event(1))

    initial = make.initial(theta=_named("decoder", decoder), phi=_named("encoder", encoder))
    traits = ProblemTraits(local=True, modules=True, needs=("sklearn",))
    return problem("digits_vae", model, guide, (x,), ("z",), initial, traits)


def _fill(module: nn.Module, make: Maker) -> nn.Module:
    module.to(make.device, make.dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(make(WEIGHT_SCALE * make.noise(*parameter.shape)))
    return module


def _named(name: str, module: nn.Module) -> dict[str, Tensor]:
    """Return the module's parameters under the names that `pyro.module` gives them."""
    return {f"{name}$$${key}": value.detach() for key, value in module.named_parameters()}
