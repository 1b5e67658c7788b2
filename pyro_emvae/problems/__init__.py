r"""Small models with exact evidence, posterior and gradients, three on real data, and counts of single cells.

The parameter values are asymmetric on purpose: symmetric ones hide sign errors. Tests, comparison tables and benchmarks
run over all registered problems and choose by `ProblemTraits`.

Example:
    >>> from pyro_emvae.problems import local_global
    >>> problem = local_global()
    >>> problem.sites, problem.exact
    (('mu', 'z'), ('log_evidence', 'elbo', 'posterior', 'maximum'))
"""

from .._registry import register
from ._problem import Problem, ProblemTraits, exact_gradients
from .counts import CountEncoder, Counts, batch_effects, count_model, simulate_counts
from .digits import Digits, digits_vae, load_digits_binary
from .discrete import bernoulli, bernoulli_vector, categorical, discrete_two_level
from .gaussian import masked, normal_normal, subsampled
from .h5ad import BackedCounts
from .hierarchical import local_global, local_global_subsampled, mixed_two_level, two_level
from .idx import load_idx_binary, read_idx
from .linear_gaussian import linear_gaussian, linear_gaussian_full
from .regression import eight_schools, logistic_regression
from .skewed import skewed, skewed_gamma

__all__ = [
    "BackedCounts",
    "CountEncoder",
    "Counts",
    "Digits",
    "Problem",
    "ProblemTraits",
    "batch_effects",
    "bernoulli",
    "bernoulli_vector",
    "categorical",
    "count_model",
    "digits_vae",
    "discrete_two_level",
    "eight_schools",
    "exact_gradients",
    "linear_gaussian",
    "linear_gaussian_full",
    "load_digits_binary",
    "load_idx_binary",
    "local_global",
    "local_global_subsampled",
    "logistic_regression",
    "masked",
    "mixed_two_level",
    "normal_normal",
    "read_idx",
    "simulate_counts",
    "skewed",
    "skewed_gamma",
    "subsampled",
    "two_level",
]

_PPCA = "Tipping and Bishop 1999, eqs. 4, 7, 8"
_MOHAMED = "Mohamed et al. 2020, section 8"
_VAE = "Kingma and Welling 2013, figure 3"

for _factory, _summary, _source in (
    (normal_normal, "one global normal latent; everything closed-form", ""),
    (subsampled, "the same under minibatches of two of five", ""),
    (linear_gaussian, "probabilistic PCA, amortized diagonal guide", _PPCA),
    (linear_gaussian_full, "probabilistic PCA, amortized full-rank guide that contains the posterior", _PPCA),
    (skewed, "Gamma prior, Poisson counts, LogNormal guide", ""),
    (skewed_gamma, "the same with a Gamma guide that contains the posterior", ""),
    (bernoulli, "variable selection with three Bernoulli sites", ""),
    (bernoulli_vector, "the same with one site of event shape (3,)", ""),
    (categorical, "a mixture of three normals, free logits per datum", ""),
    (local_global, "one global and six local normals, factorised guide with local parameters", ""),
    (local_global_subsampled, "the same under minibatches of two of six", ""),
    (two_level, "a chain of two normals without plates, guide z1 then z2 given z1", ""),
    (discrete_two_level, "two Bernoulli latents, the second given the first", ""),
    (mixed_two_level, "a Bernoulli latent, then a normal one given it", ""),
    (masked, "nested plates, ragged series with missing data", ""),
    (eight_schools, "the eight schools, non-centred, mean-field guide", "Rubin 1981"),
    (logistic_regression, "Bayesian logistic regression, breast cancer data", _MOHAMED),
    (digits_vae, "Bernoulli VAE on scikit-learn's 8x8 digits", _VAE),
):
    register("problem", _factory.__name__, _factory, summary=_summary, source=_source)
