r"""The exact posterior of discrete latents, by Pyro's enumeration."""

from __future__ import annotations

import copy
import functools
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import config_enumerate
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree, contract_to_tensor
from torch import Tensor

from .._checks import StepError, fail, nearest
from .._pyro import scale_and_mask
from ..particles import hold_batch, is_subsample, refuse_non_finite, report, with_own_mask
from ._masks import counted_without, refuse_counted
from ._plates import Batch, in_plates
from ._squares import squares
from .base import Posterior, Support

__all__ = ["EnumeratedPosterior"]

MAX_OUTCOMES = 100_000


class EnumeratedPosterior(Posterior):
    r"""$p_\theta(z|x)$ over all discrete latents, exact.

    The log joint is a sum of factors $f_c(z_c)$, one per site, each over few latents. Summing the latents out by Pyro's
    tensor contraction gives $\log p(x)$, at a cost linear in the length of a chain, and its derivative by each factor
    is the posterior probability of that factor's outcomes, $\partial\log p(x)/\partial f_c(z_c)=p(z_c|x)$. So

    $$E[\log p_\theta(x,z)]=\sum_c\sum_{z_c}p(z_c|x)f_c(z_c;\theta).$$

    Args:
        model: A Pyro callable; latents are enumerated in parallel, whatever their annotation says.
        args, kwargs: The data.
        max_plate_nesting: Number of plate dims of the model.

    Raises:
        StepError: A latent is continuous, or there is none; or a site counts where a latent that it depends on is
            masked.

    Source: Darwiche 2003 for marginals as derivatives; Obermeyer et al. 2019 for the contraction. On a chain this is
    the forward-backward algorithm.

    Example:
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Bernoulli(0.5))
        ...         pyro.sample("x", dist.Normal(2 * z, 1.0), obs=x)
        >>> posterior = EnumeratedPosterior(model, (torch.tensor([1.0, 2.0]),), {}, 1)
        >>> posterior.marginal("z").probs
        tensor([0.5000, 0.8808])
    """

    kind = "enumerated"
    is_exact = True

    def __init__(self, model: Callable, args: tuple, kwargs: Mapping[str, Any], max_plate_nesting: int) -> None:
        self.model, self.args, self.kwargs, self.nesting = model, args, kwargs, max_plate_nesting
        with torch.no_grad():
            self.trace, self.batch = _trace(model, args, kwargs, max_plate_nesting)
        self.latents = _latents(self.trace)
        self._ordinals = {
            name: frozenset(self.trace.plate_to_symbol[f.name] for f in _frames(site))
            for name, site in _sites(self.trace).items()
        }
        self._name_of = {_symbol(site): name for name, site in self.latents.items()}
        self._place = {name: place for place, name in enumerate(self.latents)}
        self._symbols = set(self._name_of)
        factors = _factors(self.trace, self.latents)
        self._touched = {n: f for n, f in factors.items() if self._symbols & set(f._pyro_dims)}
        self._require_kept_latents()
        self._scale = _common_scale([self.trace.nodes[name] for name in self._touched])
        untouched = [self.trace.nodes[n]["log_prob_sum"].double() for n in factors if n not in self._touched]
        self._rest = torch.stack(untouched).sum() if untouched else 0.0

    def _require_kept_latents(self) -> None:
        """Refuse a site that counts where a latent that it depends on is masked: leaving that out would be wrong."""
        masks = {name: self.mask(name) for name in _sites(self.trace)}
        suspects = counted_without({name: self.depends(name) for name in self._touched}, masks)
        refuse_counted("Enumerated", (pair for pair in suspects if self._moves(*pair)))

    def _moves(self, name: str, site: str) -> bool:
        """Whether a latent moves a site's factor where the latent is masked."""
        factor, latents = self._touched[site], self.depends(site)
        rows = self._unpacked(factor, factor._pyro_dims, self._ordinals[site], latents)
        axis = self.nesting + list(latents).index(name)
        varies = (rows.amax(axis, keepdim=True) != rows.amin(axis, keepdim=True)).flatten(self.nesting).any(-1)
        return bool((varies & ~self.mask(name)).any())

    @cached_property
    def log_evidence(self) -> float:
        """log p(x), in nats, with the model's scales."""
        return report(self._solved[0])

    @cached_property
    def entropy(self) -> float:
        """Entropy of the posterior, in nats, with the model's scales; taken at the theta of the E-step."""
        with torch.no_grad():
            return self.log_evidence - float(self._expected(self.trace))

    @cached_property
    def _solved(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The log evidence, and the posterior probability of each factor's outcomes."""
        if self._alone is not None:
            return self._solved_alone(*self._alone)
        leaves = {}
        for name, factor in self._touched.items():
            leaves[name] = leaf = factor.detach().clone().requires_grad_()
            leaf._pyro_dims = factor._pyro_dims
        with torch.enable_grad():
            tree = contract_tensor_tree(self._tree(leaves), set(self._symbols))
            total = torch.stack([term.sum() for terms in tree.values() for term in terms]).sum()
            grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
        evidence = self._rest + total.detach().double() * self._scale
        return evidence, dict(zip(leaves, grads, strict=True))

    @cached_property
    def _alone(self) -> tuple[Tensor, Tensor] | None:
        """The log normalizer and the packed log posterior of the only latent, by Bayes' rule; None if it is not alone.

        A mixture needs no contraction: all factors are over the same plates and the same outcomes.
        """
        if len(self.latents) > 1 or len({self._ordinals[name] for name in self._touched}) > 1:
            return None
        with torch.no_grad():
            terms = packed.broadcast_all(*self._touched.values())
            dims = terms[0]._pyro_dims
            joint = sum(terms[1:], terms[0])
            normalizer = joint.logsumexp(dims.index(next(iter(self._symbols))), keepdim=True)
            logits = joint - normalizer
        logits._pyro_dims = dims
        return normalizer.sum().double(), logits

    def _solved_alone(self, normalizer: Tensor, logits: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        probabilities, dims, found = logits.exp(), logits._pyro_dims, {}
        for name, factor in self._touched.items():
            mine = factor._pyro_dims
            others = [place for place, dim in enumerate(dims) if dim not in mine]
            part = probabilities.sum(others) if others else probabilities
            kept = [dim for dim in dims if dim in mine]
            found[name] = part if "".join(kept) == mine else part.permute(*[kept.index(dim) for dim in mine])
        return self._rest + normalizer * self._scale, found

    def tempered(self, beta: float) -> EnumeratedPosterior:
        """Return the posterior of the factors to the power of beta; its ``log_evidence`` is NaN, it has an entropy.

        Where latents are masked the entropy is NaN as well.
        """
        new = copy.copy(self)
        for name in ("log_evidence", "entropy", "_solved", "_alone", "_sites_of"):
            vars(new).pop(name, None)
        new._touched = {name: packed.scale_and_mask(f, scale=beta) for name, f in self._touched.items()}
        new.is_exact, log_z = beta == 1.0, float(new._solved[0]) - self._rest
        masked = any(self.mask(name) is not None for name in self.latents)
        with torch.no_grad():
            expected = float(new._expected(self.trace)) - self._rest
        vars(new).update(log_evidence=math.nan, entropy=math.nan if masked else float(log_z - beta * expected))
        return new

    def log_evidence_at_theta(self) -> Tensor:
        r"""Return $\log p_\theta(x)$ at the present theta, to be differentiated by it, twice too: scalar, nats."""
        with hold_batch(self.batch.indices):
            trace, _ = _trace(self.model, self.args, self.kwargs, self.nesting)
        factors = _factors(trace, _latents(trace))
        tree = contract_tensor_tree(self._tree({n: factors[n] for n in self._touched}), set(self._symbols))
        total = torch.stack([term.sum() for terms in tree.values() for term in terms]).sum() * self._scale
        for name in factors.keys() - self._touched.keys():
            total = total + trace.nodes[name]["log_prob_sum"]
        return total

    def _tree(self, factors: Mapping[str, Tensor]) -> OrderedDict:
        tree: OrderedDict = OrderedDict()
        for name, factor in factors.items():
            tree.setdefault(self._ordinals[name], []).append(factor)
        return tree

    def expected_log_joint(self, num_particles: int = 1) -> Tensor:
        with hold_batch(self.batch.indices):
            trace, _ = _trace(self.model, self.args, self.kwargs, self.nesting)
        return self._expected(trace)

    def _expected(self, trace: poutine.Trace) -> Tensor:
        factors = _factors(trace, _latents(trace))
        total = torch.zeros(())
        for name, factor in factors.items():
            if name in self._touched:
                probabilities = self._solved[1][name]
                # an impossible outcome has probability 0 and log density -inf
                term = torch.where(probabilities > 0, probabilities * factor, 0.0)
                term._pyro_dims = factor._pyro_dims
                term = packed.scale_and_mask(term, mask=trace.nodes[name]["packed"]["mask"])
                total = total + term.sum() * self._scale
            else:
                total = total + trace.nodes[name]["log_prob_sum"]
        return total

    @property
    def scale(self) -> float:
        """What the model multiplies the latents' densities by."""
        return self._scale

    @property
    def drawn(self) -> tuple[str, ...]:
        """Plates of the model that drew their batch at random."""
        return tuple(self.batch.drawn)

    def depends(self, site: str) -> tuple[str, ...]:
        """Return the latents that a site's density depends on, in the model's order: a latent comes last of its own."""
        return self._named(self._factor(site)._pyro_dims)

    def _named(self, dims: str) -> tuple[str, ...]:
        """Return the latents among packed dims, in the model's order."""
        return tuple(sorted((self._name_of[s] for s in dims if s in self._symbols), key=self._place.__getitem__))

    def clique(self, site: str) -> Tensor:
        r"""Return the joint posterior probability of the latents that one site's density depends on.

        For $z_t$ given $z_{t-1}$ in a chain that is $p(z_{t-1},z_t|x)$, for an observation of $z_t$ it is
        $p(z_t|x)$. All cliques together cost one run of forward-backward.

        Args:
            site: A latent, or an observed site that depends on one.

        Shape: ``(*plates, *outcomes)``: every plate dim of the model, of size 1 for those that the site is not in;
        then the outcomes of each latent of `depends`, in that order.

        The model's mask and scale are left out: the latents of a masked datum have their posterior too. See
        `expected_counts`.

        Raises:
            StepError: The model has no such site, or it depends on no latent.

        Example:
            >>> def model(x):
            ...     a = pyro.sample("a", dist.Bernoulli(0.5))
            ...     b = pyro.sample("b", dist.Bernoulli(0.2 + 0.6 * a))
            ...     pyro.sample("x", dist.Normal(b, 1.0), obs=x)
            >>> posterior = EnumeratedPosterior(model, (torch.tensor(0.5),), {}, 0)
            >>> posterior.clique("b")  # rows: a, columns: b
            tensor([[0.4000, 0.1000],
                    [0.1000, 0.4000]])
        """
        factor = self._factor(site)
        return self._unpacked(self._solved[1][site], factor._pyro_dims, self._ordinals[site], self.depends(site))

    def expected_counts(self, site: str) -> Tensor:
        """Return `clique` times the model's scale, and zero where the site's mask is false: summed over the plates, the
        expected number of times that the outcomes occur in the data.
        """
        factor = self._factor(site)
        counts = self._solved[1][site] * self._scale
        counts._pyro_dims = factor._pyro_dims
        masked = packed.scale_and_mask(counts, mask=self.trace.nodes[site]["packed"]["mask"])
        return self._unpacked(masked, masked._pyro_dims, self._ordinals[site], self.depends(site))

    def mask(self, site: str) -> Tensor | None:
        """Return where the model keeps a site, ``(*plates)`` or broadcastable to it; None: everywhere."""
        mask = self.trace.nodes[site]["mask"]
        if mask is None or mask is True:
            return None
        mask = torch.as_tensor(mask)
        return mask.reshape((1,) * (self.nesting - mask.dim()) + mask.shape)

    def _factor(self, site: str) -> Tensor:
        if site not in self._touched:
            fail(
                StepError,
                "EnumeratedPosterior",
                f"give the clique of {site!r}",
                got="no site of that name whose density depends on a latent",
                because="a clique is the latents that a site depends on",
                fix=nearest(site, self._touched),
            )
        return self._touched[site]

    def _unpacked(self, tensor: Tensor, dims: str, ordinal: frozenset, names: Iterable[str]) -> Tensor:
        """Return a packed tensor as ``(*plates, *outcomes of the latents named)``."""
        symbols = [_symbol(self.latents[name]) for name in names]
        plates = [next(iter(self._plates[dim] & ordinal), None) for dim in range(-self.nesting, 0)]
        order = [s for s in (*plates, *symbols) if s is not None and s in dims]
        tensor = tensor.permute(*[dims.index(s) for s in order])
        return tensor.reshape([tensor.shape[order.index(s)] if s in order else 1 for s in (*plates, *symbols)])

    def _table(self, names: list[str]) -> Tensor:
        """Return the joint log probability of latents: ``(*plates, outcomes of each)``."""
        if self._alone is not None:
            return self._unpacked(self._alone[1], self._alone[1]._pyro_dims, self._ordinals[names[0]], names)
        ordinal = frozenset.union(*[self._ordinals[name] for name in names])
        symbols = [_symbol(self.latents[name]) for name in names]
        found = self._marginalized(ordinal, symbols)
        if found is None:
            found = contract_to_tensor(
                self._tree(dict(self._touched)), set(self._symbols), target_ordinal=ordinal, target_dims=set(symbols)
            )
        logits = self._unpacked(found, found._pyro_dims, ordinal, names)
        flat = logits.reshape(*logits.shape[: self.nesting], -1)
        return (flat - flat.logsumexp(-1, keepdim=True)).reshape(logits.shape)

    def _marginalized(self, ordinal: frozenset, symbols: list[str]) -> Tensor | None:
        """Return the packed log probability of latents that are all in one clique; None if there is no such clique."""
        for name in self._sites_of[symbols[-1]]:
            dims = self._touched[name]._pyro_dims
            if self._ordinals[name] == ordinal and set(symbols) <= set(dims):
                out = [i for i, s in enumerate(dims) if s in self._symbols and s not in symbols]
                found = (self._solved[1][name].sum(out) if out else self._solved[1][name]).log()
                found._pyro_dims = "".join(s for i, s in enumerate(dims) if i not in out)
                return found
        return None

    @cached_property
    def _sites_of(self) -> dict[str, list[str]]:
        """The sites whose density depends on a latent, by its symbol."""
        found: dict[str, list[str]] = {symbol: [] for symbol in self._symbols}
        for name, factor in self._touched.items():
            for symbol in self._symbols & set(factor._pyro_dims):
                found[symbol].append(name)
        return found

    @cached_property
    def _blankets(self) -> dict[str, list[str]]:
        r"""The earlier latents that each one depends on given all earlier ones and the data.

        They are its neighbours when the latents are summed out from the last to the first.
        """
        near: dict[str, set[str]] = {name: set() for name in self.latents}
        for factor in self._touched.values():
            together = set(self._named(factor._pyro_dims))
            for name in together:
                near[name] |= together - {name}
        for name in reversed(self.latents):
            for other in near[name]:
                near[other] = (near[other] | near[name]) - {name, other}
        return {name: sorted(near[name], key=self._place.__getitem__) for name in self.latents}

    @cached_property
    def _plates(self) -> dict[int, set[str]]:
        """The symbols of the plates at each dim."""
        found: dict[int, set[str]] = {dim: set() for dim in range(-self.nesting, 0)}
        for site in _sites(self.trace).values():
            for frame in _frames(site):
                found[frame.dim].add(self.trace.plate_to_symbol[frame.name])
        return found

    def marginal(self, site: str) -> Any:
        """Return the distribution of one latent, of the kind that the model gives it."""
        found = self.latents.get(site)
        if found is None:
            fail(
                StepError,
                "EnumeratedPosterior",
                f"give the marginal of {site!r}",
                got="no such latent",
                because="the model's discrete latents were enumerated",
                fix=nearest(site, self.latents),
            )
        return _distribution(found["fn"], _squeeze(self._table([site]), self.nesting))

    def support(self, num_particles: int = 1) -> Support:
        names = list(self.latents)
        sizes = [_outcomes(site).shape[0] for site in self.latents.values()]
        if math.prod(sizes) > MAX_OUTCOMES or len({self._ordinals[name] for name in names}) > 1:
            fail(
                StepError,
                "EnumeratedPosterior",
                "list the joint outcomes of the latents",
                got=f"{len(names)} latents with {math.prod(sizes):.3g} joint outcomes",
                because="statistics are taken over joint outcomes per datum",
                fix="Use an M-step that reads marginals: steps.Gradient(), or steps.hidden_markov() for a chain.",
            )
        table = self._table(names)
        table = table.reshape(*table.shape[: self.nesting], -1).movedim(-1, 0)
        digits = torch.cartesian_prod(*[torch.arange(size) for size in sizes]).reshape(-1, len(sizes))
        values = {}
        for place, (name, site) in enumerate(self.latents.items()):
            outcomes = _outcomes(site)[digits[:, place]]
            event = outcomes.shape[1:]
            values[name] = outcomes.reshape(-1, *(1,) * self.nesting, *event)
        first = next(iter(self.latents.values()))
        mask = first["mask"]
        mask = mask if isinstance(mask, Tensor) else None
        return Support(values, table, self.nesting, self._scale, mask, self.drawn)

    def sample(self, plates: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        plates = dict(plates or {})
        for name, site in self.latents.items():
            earlier = [n for n in self._blankets[name] if self._ordinals[n] <= self._ordinals[name]]
            logits = self._table([*earlier, name])
            for place, other in enumerate(earlier):
                index = _index(self.latents[other], values[other])
                logits = _gather(logits, index, len(earlier) - place + 1)
            fn = _distribution(site["fn"], _squeeze(logits, self.nesting))
            with in_plates(_frames(site), self.batch.indices, plates, site["scale"], site["mask"]):
                values[name] = pyro.sample(name, fn)
        return values


# Of a trace ---------------------------------------------------------------------------------------------------------


def _trace(model: Callable, args: tuple, kwargs: Mapping[str, Any], nesting: int) -> tuple[poutine.Trace, Batch]:
    """Return the model's trace with all discrete latents enumerated, densities packed; and the batch that was drawn."""
    enumerated = poutine.enum(config_enumerate(model, "parallel"), first_available_dim=-1 - nesting)
    with Batch() as batch:
        trace = poutine.trace(enumerated).get_trace(*args, **kwargs)
    for name in [name for name, site in _sites(trace).items() if is_subsample(site)]:
        trace.remove_node(name)
    for site in _sites(trace).values():
        _move_own_mask(site, nesting)
    try:
        _score_normals(trace)
        trace.compute_log_prob()
    except ValueError as cause:
        for name, site in _sites(trace).items():
            refuse_non_finite("Enumerated", name, site["value"], cause)
        raise
    trace.pack_tensors()
    return trace, batch


def _move_own_mask(site: dict, nesting: int) -> None:
    """Treat the mask inside a latent's distribution as one around it, unless it depends on other latents."""
    moved = with_own_mask(dict(site))
    if not isinstance(moved["mask"], Tensor) or moved["mask"].dim() <= nesting:
        site.update(fn=moved["fn"], mask=moved["mask"])


def _score_normals(trace: poutine.Trace) -> None:
    """Note the log densities of normals; `compute_log_prob` leaves alone what is noted."""
    for site in _sites(trace).values():
        found = None if site["args"] or site["kwargs"] else squares(site["fn"], site["value"])
        if found is not None:
            kept = scale_and_mask(found, site["scale"], site["mask"])
            site.update(unscaled_log_prob=found, log_prob=kept, log_prob_sum=kept.sum())


def _sites(trace: poutine.Trace) -> dict[str, dict]:
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def _symbol(site: Mapping[str, Any]) -> str:
    return site["infer"]["_enumerate_symbol"]


def _frames(site: Mapping[str, Any]) -> list:
    return [frame for frame in site["cond_indep_stack"] if frame.vectorized]


def _latents(trace: poutine.Trace) -> dict[str, dict]:
    """Return the enumerated sites; refuse other latents."""
    latents = {name: site for name, site in _sites(trace).items() if not site["is_observed"]}
    for name, site in latents.items():
        if site["infer"].get("_enumerate_dim") is None:
            fail(
                StepError,
                "Enumerated",
                f"sum out site {name!r}",
                got=f"{type(site['fn']).__name__}{tuple(site['fn'].shape())}",
                because="it has no finite support that Pyro enumerates",
                fix="Use steps.Gaussian() or steps.MonteCarlo(), or give the site's elements a plate in place of "
                ".to_event().",
            )
    if not latents:
        fail(
            StepError,
            "Enumerated",
            "be the E-step",
            got="a model without latents",
            because="there is nothing to average over",
            fix="Use SVI to maximise the likelihood.",
        )
    return latents


def _factors(trace: poutine.Trace, latents: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return each site's packed log density, unscaled, of one dtype; masked unless a latent, which then sums to one."""
    factors = {}
    for name, site in _sites(trace).items():
        parts = site["packed"]
        mask = None if name in latents else parts["mask"]
        factors[name] = packed.scale_and_mask(parts["unscaled_log_prob"], mask=mask)
    dtype = functools.reduce(torch.promote_types, (f.dtype for f in factors.values()))
    for name, factor in factors.items():
        if factor.dtype != dtype:
            factors[name] = factor.to(dtype)
            factors[name]._pyro_dims = factor._pyro_dims
    return factors


def _common_scale(sites: list[Mapping[str, Any]]) -> Any:
    scales = {float(site["scale"]) if not isinstance(site["scale"], Tensor) else _scalar(site) for site in sites}
    if len(scales) > 1:
        fail(
            StepError,
            "Enumerated",
            "sum out latents",
            got=f"scales {sorted(scales)}",
            because="a scale multiplies the logarithm of a sum, so all its terms need the same",
            fix="Put poutine.scale around the latent and what depends on it.",
        )
    return next(iter(scales))


def _scalar(site: Mapping[str, Any]) -> float:
    if site["scale"].numel() > 1:
        fail(
            StepError,
            "Enumerated",
            f"sum out latents with the scale at site {site['name']!r}",
            got=f"a tensor of shape {tuple(site['scale'].shape)}",
            because="a scale multiplies the logarithm of a sum, and has to be one number",
            fix="Use poutine.mask, or one number as the scale.",
        )
    return float(site["scale"])


def _outcomes(site: Mapping[str, Any]) -> Tensor:
    """Return the outcomes of one latent: ``(outcomes, *event)``."""
    support = site["fn"].enumerate_support(expand=False)
    return support.reshape(support.shape[0], *site["fn"].event_shape)


def _index(site: Mapping[str, Any], value: Tensor) -> Tensor:
    """Return which outcome a value is."""
    outcomes, event = _outcomes(site), site["fn"].event_dim
    same = value.unsqueeze(-1 - event) == outcomes
    return (same.flatten(-event).all(-1) if event else same).long().argmax(-1)


def _gather(logits: Tensor, index: Tensor, outcomes: int) -> Tensor:
    """Condition a table ``(*plates, first, ...)`` on the first latent's outcome; `outcomes` dims are not plates."""
    plates = torch.broadcast_shapes(index.shape, logits.shape[:-outcomes])
    logits, dim = logits.expand(*plates, *logits.shape[-outcomes:]), len(plates)
    rest = logits.shape[dim + 1 :]
    index = index.expand(plates).reshape(*plates, 1, *(1,) * len(rest)).expand(*plates, 1, *rest)
    return logits.gather(dim, index).squeeze(dim)


def _squeeze(logits: Tensor, nesting: int) -> Tensor:
    """Drop leading plate dims of size 1."""
    while nesting and logits.dim() > 1 and logits.shape[0] == 1:
        logits, nesting = logits.squeeze(0), nesting - 1
    return logits


def _distribution(fn: Any, logits: Tensor) -> Any:
    """Return a distribution over the outcomes, of the same kind as the model's where that has logits."""
    if hasattr(fn, "at_outcomes"):
        return fn.at_outcomes(logits)
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    if isinstance(fn, dist.Bernoulli):
        return dist.Bernoulli(logits=logits[..., 1] - logits[..., 0])
    if isinstance(fn, dist.OneHotCategorical):
        return dist.OneHotCategorical(logits=logits)
    return dist.Categorical(logits=logits)
