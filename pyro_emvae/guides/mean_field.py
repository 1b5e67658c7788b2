r"""`AutoMeanField`: free parameters per site, and per row of a table where data come in minibatches."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoGuideList
from pyro.infer.autoguide.initialization import InitMessenger, init_to_feasible
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import biject_to
from torch.distributions.transforms import IndependentTransform, Transform
from torch.nn.functional import embedding

from .._checks import EmvaeError, ModelError, fail, nearest, require_data
from .._registry import create
from ..families import Family, Normal
from ..particles import quiet
from ._base import state_of
from ._tables import Table, TableReader, table_of

__all__ = ["AutoMeanField"]

DISCRETE = ("bernoulli", "categorical", "one_hot")


@dataclass(frozen=True)
class MeanFieldSite:
    """A latent: its family, how its values lie in it, its plates and where its contexts are kept."""

    name: str
    family: Family
    event_dim: int
    event_shape: torch.Size
    transform: Transform | None
    frames: tuple = field(repr=False)
    table: Table
    infer: Mapping[str, Any] = field(repr=False)

    @property
    def key(self) -> str:
        return self.name.replace(".", "/")


class AutoMeanField(AutoGuide):
    r"""Independent sites with free parameters, of any family: a value per element, no network.

    $$q_\phi(z)=\prod_s\prod_n q\big(z_{sn}\mid\phi_{sn}\big).$$

    A real site is drawn directly, so that closed-form KL and every estimator apply to it, as are sites of a family of
    their own support (Gamma, Beta, Bernoulli, ...). Another is drawn as ``{name}_unconstrained`` (auxiliary) and mapped
    by `biject_to`, as `AutoNormal` does it.

    **Minibatches.** Local sites have one row of parameters per datum, $N$ in all; a call reads and differentiates the
    rows of its batch only. Their gradient is a sparse tensor, so that a step costs nothing for the other rows, in time
    or memory, and leaves them bit for bit: Adam on a dense gradient would move them by momentum. `emvae.SVI` and
    `emvae.EM` take any optimizer for it and update rows by its rule; `steps.NaturalGradient` moves them by natural
    gradients, without one. With Pyro's own SVI write
    ``pyro.optim.PyroOptim(optimizers.RowAdam, {"lr": 0.01})``; `torch.optim.Adam` refuses sparse gradients.
    ``sparse=False`` gives dense gradients.

    When to use: global latents; local ones where an encoder is not worth it; discrete ones. New data need `run` again:
    `AutoAmortized` answers at once.

    Args:
        model: A Pyro model.
        family: A registered name or an instance, or a mapping from site to these. By default normal with standard
            deviation 0.1 in unconstrained space. Discrete sites that it does not fit get Bernoulli, categorical or
            one-hot probabilities, which start equal.
        init_loc_fn: Where continuous sites start, as in Pyro's autoguides.
        sparse: Whether the gradient of a minibatch's rows is sparse.
        create_plates: As in `pyro.infer.autoguide.AutoGuide`. Not needed for minibatches: indices that the model gives
            to its plate are read from a run up to its first local site.

    Shape: ``contexts``: by site ``(N, *other plates, columns)``, of which the family says what they mean.

    Raises:
        ModelError: At the first call: no latent, a family that does not fit its site, an unknown site. At any call:
            more data than the table has rows.
        DataError: The data are empty.

    Source: Kucukelbir et al. 2017 for the normal family; Pyro's `AutoNormal`.

    Example:
        >>> def model(x):
        ...     rate = pyro.sample("rate", dist.Gamma(2.0, 1.0))
        ...     with pyro.plate("data", len(x)):
        ...         k = pyro.sample("k", dist.Bernoulli(0.3))
        ...         pyro.sample("x", dist.Normal(k, rate), obs=x)
        >>> guide = AutoMeanField(model)
        >>> {name: tuple(value.shape) for name, value in guide(torch.randn(4)).items()}
        {'rate': (), 'k': (4,)}
        >>> guide
        AutoMeanField(rate: Normal(init_scale=0.1), k: Bernoulli(init_prob=0.5))
    """

    def __init__(
        self,
        model: Callable,
        family: str | Family | Mapping[str, Any] | None = None,
        *,
        init_loc_fn: Callable[[dict], Tensor] = init_to_feasible,
        sparse: bool = True,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        reader = TableReader("AutoMeanField")
        super().__init__(InitMessenger(self._first_value)(reader(model)), create_plates=create_plates)
        named = isinstance(family, Mapping)
        self.families = {n: create("family", f) for n, f in family.items()} if named else {}
        self.family: Family = Normal(init_scale=0.1) if family is None or named else create("family", family)
        self.init_loc_fn, self.sparse, self._reader = init_loc_fn, sparse, reader
        self._sites: tuple[MeanFieldSite, ...] = ()
        self._tap: Callable[[MeanFieldSite, Tensor, Mapping[str, Any]], Tensor] | None = None
        for given in (self.family, *self.families.values()):
            _check_family(given)

    # Set-up -------------------------------------------------------------------------------------------------------

    def prepare(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Look at the model once, if that has not been done."""
        if self.prototype_trace is None:
            require_data("AutoMeanField", args, kwargs)
            try:
                self._setup_prototype(*args, **kwargs)
            except BaseException:
                self.prototype_trace = None
                raise

    @property
    def sites(self) -> tuple[MeanFieldSite, ...]:
        """The latents in the model's order; known after the first call."""
        return self._sites

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        with quiet(train=False), torch.no_grad():
            super()._setup_prototype(*args, **kwargs)
        for name in ("_INPUT", "_RETURN"):
            self.prototype_trace.remove_node(name)
        nodes = dict(self.prototype_trace.iter_stochastic_nodes())
        _check_names(nodes, self.families)
        self._sites = tuple(self._site(node) for node in nodes.values())
        self.contexts = PyroModule()
        for site in self._sites:
            setattr(self.contexts, site.key, nn.Parameter(self._start(site, nodes[site.name])))
        for site in self._sites:
            for module in site.family.modules():
                module.to(getattr(self.contexts, site.key))
        self.modules_of_families = nn.ModuleList([m for site in self._sites for m in site.family.modules()])

    def _first_value(self, msg: dict) -> Tensor | None:
        return msg["fn"].sample() if msg["fn"].support.is_discrete else self.init_loc_fn(msg)

    def _site(self, node: Mapping[str, Any]) -> MeanFieldSite:
        name, fn = node["name"], node["fn"]
        family = self.families.get(name, self.family)
        if name not in self.families and fn.support.is_discrete and not family.fits(fn):
            fitting = [kind for kind in DISCRETE if create("family", kind).fits(fn)]
            family = create("family", fitting[0]) if fitting else family
        family = family.for_site(name, fn)
        frames = tuple(f for f in node["cond_indep_stack"] if f.vectorized)
        table = table_of(fn.batch_shape, frames)
        infer = {key: value for key, value in (node["infer"] or {}).items() if key == "estimator"}
        if family.direct:
            return MeanFieldSite(name, family, fn.event_dim, fn.event_shape, None, frames, table, infer)
        transform = biject_to(fn.support)
        table.check_support(name, fn.support)
        if transform.codomain.event_dim < fn.event_dim:
            transform = IndependentTransform(transform, fn.event_dim - transform.codomain.event_dim)
        shape = torch.Size(transform.inverse_shape(fn.batch_shape + fn.event_shape)[len(fn.batch_shape) :])
        transform = None if _is_identity(transform) else transform
        return MeanFieldSite(name, family, fn.event_dim, shape, transform, frames, table, infer)

    def _start(self, site: MeanFieldSite, node: Mapping[str, Any]) -> Tensor:
        value = node["value"]
        with torch.no_grad():
            value = value if site.transform is None else site.transform.inv(value)
            value = value if value.is_floating_point() else value.to(_dtype(node["fn"]))
            return site.table.laid_out(site.family.start(value, site.event_shape)).clone()

    # The guide ----------------------------------------------------------------------------------------------------

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        model, last = self._model and self.model, self._sites[-1].name
        if self.master is not None or self.create_plates is not None:
            owner = self if self.master is None else self.master()
            if isinstance(owner, AutoGuideList) and owner.create_plates is None and model is not None:
                self._reader.require_drawn(model, last, args, kwargs)
            return super()._create_plates(*args, **kwargs)
        self.plates = self._reader.plates(model, self._prototype_frames, last, args, kwargs)
        return self.plates

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every site; takes the arguments of the model.

        Returns:
            Values by site name.
        """
        self.prepare(args, kwargs)
        plates = self._create_plates(*args, **kwargs)
        contexts, result = self.contexts, {}
        if len(self.modules_of_families):
            _ = self.modules_of_families
        for site in self._sites:
            context = site.table.read(getattr(contexts, site.key), plates, self._rows)
            context = context if self._tap is None else self._tap(site, context, plates)
            fn = site.family.distribution(context, site.event_shape)
            with contextlib.ExitStack() as stack:
                for frame in site.frames:
                    stack.enter_context(plates[frame.name])
                result[site.name] = _sample(site, fn)
        return result

    @contextlib.contextmanager
    def tapped(self, tap: Callable[[MeanFieldSite, Tensor, Mapping[str, Any]], Tensor]) -> Iterator[None]:
        """Let each call draw from the contexts ``tap(site, context, plates)`` in place of its own."""
        self._tap = tap
        try:
            yield
        finally:
            self._tap = None

    def write(self, site: MeanFieldSite, plates: Mapping[str, Any], context: Tensor) -> None:
        """Set the contexts ``(*batch, columns)`` of the data that the plates have in use, and no others."""
        site.table.write(getattr(self.contexts, site.key), plates, context)

    def _rows(self, table: Tensor, index: Tensor) -> Tensor:
        return embedding(index, table, sparse=True) if self.sparse else table.index_select(0, index)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of each coordinate for all data, by site name."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        r"""Return quantiles of each coordinate for all data, in the batch or not.

        Args:
            quantiles: Probabilities, Q of them.
            args, kwargs: The arguments of the model; not needed after the first call.

        Returns:
            By site name, ``(Q, *plates, *event)``: those of the unconstrained value, mapped to the site's support.
        """
        self.prepare(args, kwargs)
        result = {}
        for site in self._sites:
            context = site.table.whole(getattr(self.contexts, site.key))
            fn = site.family.distribution(context, site.event_shape)
            levels = torch.as_tensor(quantiles, dtype=context.dtype, device=context.device)
            values = site.family.quantile(fn, levels.reshape(-1, *[1] * len(fn.shape())))
            result[site.name] = values if site.transform is None else site.transform(values)
        return result

    # Copies -------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the model; unlike in Pyro, this guide keeps it."""
        return {**state_of(self), "_reader": self._reader.copy(), "plates": {}, "init_loc_fn": init_to_feasible}

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoMeanField:
        result = memo[id(self)] = self.__class__.__new__(self.__class__)
        result.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        result._model, result._reader, result.init_loc_fn = self._model, self._reader, self.init_loc_fn
        return result

    def __repr__(self) -> str:
        return f"AutoMeanField({', '.join(f'{site.name}: {site.family}' for site in self._sites)})"


def _sample(site: MeanFieldSite, fn: Any) -> Tensor:
    if site.transform is None:
        return pyro.sample(site.name, fn, infer=dict(site.infer))
    free = pyro.sample(f"{site.name}_unconstrained", fn, infer={"is_auxiliary": True, **site.infer})
    value = site.transform(free)
    log_density = 0.0 if poutine.get_mask() is False else -site.transform.log_abs_det_jacobian(free, value)
    point = dist.Delta(value, log_density=log_density, event_dim=site.event_dim)
    return pyro.sample(site.name, point, infer={"estimator": "pathwise"} if site.infer else {})


def _dtype(fn: Any) -> torch.dtype:
    """Return the dtype of a discrete distribution's probabilities."""
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    own = [vars(fn).get(name) for name in ("logits", "probs", *fn.arg_constraints)]
    own = [x.dtype for x in own if isinstance(x, Tensor) and x.is_floating_point()]
    return own[0] if own else torch.get_default_dtype()


def _is_identity(transform: Transform) -> bool:
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return isinstance(transform, torch.distributions.transforms.ComposeTransform) and not transform.parts


def _check_family(family: Any) -> None:
    if not isinstance(family, Family):
        fail(
            EmvaeError,
            "AutoMeanField",
            "use its family",
            got=f"{family!r:.60}",
            because="a family turns parameters into a distribution",
            fix='Write family="normal", or {"z": "gamma"} by site.',
        )


def _check_names(nodes: Mapping[str, Any], families: Mapping[str, Any]) -> None:
    if not nodes:
        fail(
            ModelError,
            "AutoMeanField",
            "make its guide",
            got="a model without latents",
            because="there is nothing to draw",
            fix='Add pyro.sample("z", ...) to the model.',
        )
    for name in families:
        if name not in nodes:
            fail(
                ModelError,
                "AutoMeanField",
                f"use the family of site {name!r}",
                got="no such latent",
                because="families are given by the latents' names",
                fix=nearest(name, nodes),
            )
