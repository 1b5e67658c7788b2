r"""`AutoAmortized`: an encoder reads a batch and gives every local latent its distribution."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from .._checks import require_data
from ..families import Family
from ..particles import quiet
from ._base import state_of
from ._dependence import Dependence, earlier_of
from ._draw import (
    Call,
    encode,
    foreign_parameter,
    forget_values,
    open_plate,
    refuse_foreign,
    require_size,
    sample_site,
    take_rows,
)
from ._global import bare, give_models, make_global, set_up_global
from ._observed import Observed, find_source, observed_sites
from ._parts import check_parts, family_per_site, made_families, refuse_no_argument, seen_sites
from ._plate import DataPlate, Look, PlateReader, check_shapes, cover, look, signature
from ._reading import Reading, default_encoder, refuse_run, split_context
from ._sites import LocalSite, choose_plate, local_site

__all__ = ["AutoAmortized"]

MAX_LOOKS = 256
MODULES = ("encoder", "links", "flows")


class AutoAmortized(AutoGuide):
    r"""A guide for the latents of a data plate, with an encoder shared by all data.

    $$q_\phi(z,\theta\mid x)=q_\phi(\theta)\prod_n\prod_s q\big(z_{n,s}\mid h_{n,s}\big),\qquad
    (h_{n,1},h_{n,2},\dots)=f_\phi(x_n).$$

    When to use: one latent or more per datum, many data, new data later. Nothing is stored per datum, so that data of
    any other number of rows can follow.

    **Sites.** Latents inside the data plate are amortized, be it alone or under further plates inside it. Those
    outside, theta, have a guide of their own. A site that the model enumerates is left to `TraceEnum_ELBO`. With
    ``dependence="structured"`` a site sees the values of earlier ones, theta included, if all their plates hold it;
    ``dependence=["z", "mu"]`` shows later sites these alone, so that a large theta can be left out.
    What a model masks, such as the unobserved half of ``obs_mask=``, is masked in the guide.

    A family draws in the support of the site where it can (real ones; `families.Gamma`, `families.Categorical`, ...),
    so that estimators and closed-form KL apply to it. Another site is drawn as ``{name}_unconstrained`` (auxiliary) and
    mapped by `biject_to`; then its estimator is chosen at that auxiliary site. ``infer={"estimator": ...}`` of the
    model's site is taken over.

    **Plates.** The model is looked at once for each new shape of its arguments, as far as needed: this says how many
    data there are and how the plates are subsampled.

    * ``pyro.plate("data", len(x))``: the encoder reads x.
    * ``pyro.plate("data", N, subsample=index)`` with a minibatch x: the encoder reads x; the scale is N over its rows.
      If x holds all data, hand the batch over: ``encoder_input=lambda x, index: x[index]``.
    * ``pyro.plate("data", N, subsample_size=B)``: the guide draws the indices, the model follows; tensors of N rows
      are indexed before the encoder reads them, other inputs are taken as they are.
    * Anything else, such as a size that an attribute of the model decides: ``create_plates=``, as in all of Pyro's
      autoguides.

    * Two data plates, such as users and items, take one guide each, in Pyro's `AutoGuideList`, whose model hides the
      latents of the other: ``guide = AutoGuideList(model)``, then
      ``guide.append(AutoAmortized(poutine.block(model, hide=["item"]), encoder))`` and, for a matrix of ratings,
      ``guide.append(AutoAmortized(poutine.block(model, hide=["user"]), other, encoder_input=lambda x: x.T))``.

    **Without an encoder** the guide makes one at the first call that reads the observed values in the data plate, in
    the model's order, and their masks; ``print(guide)`` shows it. Where a value is an argument, or the rows of one that
    a plate has in use, it is read there. Otherwise every call runs the model once more to see it; a recorded step then
    makes the draws of that run too, so that its random numbers are others than an eager one's.

    Args:
        model: A Pyro model with latents in a plate.
        encoder: Any module from a batch to a context ``(rows, columns)``; the columns of the sites follow one another
            in the order of the model, see `num_features`, and those of a site under inner plates are ordered by the
            plates' dims, then by its own. Or to a mapping from site to ``(rows, *inner plates, columns)``. Its
            parameters appear as ``AutoAmortized.encoder$$$...``.
        family: What q looks like given the context: a registered name or an instance, or a mapping from site to these.
            By default `families.Normal`, or what fits a discrete support.
        amortize: The plate's name; needed if the latents in plates do not have just one in common.
        encoder_input: Called with the arguments of the model; returns what the encoder reads, a tuple for several
            arguments. By default the first positional argument.
        dependence: ``"none"``, ``"structured"``, or the names of the latents whose values later ones see.
        global_guide: Of the latents outside the data plate: a class such as `AutoMultivariateNormal`, a function of a
            model, or an instance, made of ``poutine.block(model, hide=[...])``. By default Pyro's `AutoNormal`.
        create_plates: As in `pyro.infer.autoguide.AutoGuide`.

    `Predictive`, `copy.deepcopy` (the copy shares the model), pickling (without the model, as in Pyro: the plate of a
    new shape of arguments is then told from the number of rows) and `state_dict` work; `AutoGuideList` too, whose
    plates are then used. As in all of Pyro, a plate with ``subsample_size=`` draws anew in `Predictive`: give it whole
    data.

    Raises:
        EmvaeError: The encoder is no module; a family is none; an unknown dependence; no global guide.
        DataError: At any call: the data are empty.
        ModelError: At the first call: no local latent, several plates, a family or global guide that does not fit, a
            support that differs between data, nothing that a default encoder could read, or a param store that holds
            another module under the encoder's name. At any call: an encoder output of the wrong shape; another
            structure of the model than before.

    Source: Kingma and Welling 2013; Pyro's `AutoNormal` for the auxiliary site.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> def model(x):
        ...     with pyro.plate("data", len(x)):
        ...         z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        ...         pyro.sample("x", dist.Normal(z @ torch.ones(2, 3), 1.0).to_event(1), obs=x)
        >>> guide = AutoAmortized(model, nn.Linear(3, 4))
        >>> guide(torch.randn(6, 3))["z"].shape, guide(torch.randn(50, 3))["z"].shape
        (torch.Size([6, 2]), torch.Size([50, 2]))
        >>> guide.num_features
        {'z': 4}
    """

    def __init__(
        self,
        model: Callable,
        encoder: nn.Module | None = None,
        family: str | Family | Mapping[str, Any] | None = None,
        amortize: str | None = None,
        encoder_input: Callable[..., Any] | None = None,
        *,
        dependence: str | Collection[str] = "none",
        global_guide: Any = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        check_parts(encoder, encoder_input, dependence, global_guide)
        reader = PlateReader()
        super().__init__(reader(model), create_plates=create_plates)
        self.encoder = encoder
        self.family = made_families(family)
        self.amortize = amortize
        self.encoder_input = encoder_input
        self.dependence = dependence
        self.links: Dependence | None = None
        self.flows: nn.ModuleList | None = None
        self.global_guide = global_guide if isinstance(global_guide, AutoGuide) else None
        self._make_global = None if isinstance(global_guide, AutoGuide) else global_guide
        self._reader = reader
        self.local_sites: tuple[LocalSite, ...] = ()
        self._observed: tuple[Observed, ...] = ()
        self._cover: tuple[str, ...] = ()
        self.nesting = 0
        self._first: Reading | None = None
        self._looks: dict[Any, Reading] = {}
        self._opened: dict[DataPlate, Any] = {}

    # Set-up ---------------------------------------------------------------------------------------------------

    def prepare(self, args: tuple, kwargs: dict) -> None:
        """Refuse empty data, with which the model itself could not open its plate, and look at the model once."""
        reads_first = self.encoder_input is None and self._modules.get("encoder") is not None and not self._observed
        require_data("AutoAmortized", args[:1] if reads_first else (args, kwargs))
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        before = {name: self._modules.get(name) for name in (*MODULES, "global_guide")}
        try:
            self._reader.start(None)
            try:
                with quiet(train=False), torch.no_grad():
                    super()._setup_prototype(*args, **kwargs)
            finally:
                seen = self._reader.end()
            for name in ("_INPUT", "_RETURN"):
                self.prototype_trace.remove_node(name)
            self._build(seen, args, kwargs)
        except BaseException:
            self.prototype_trace, self.local_sites, self._first, self._looks = None, (), None, {}
            for name, value in before.items():
                if name in self._modules:
                    self._modules[name] = value
            raise

    def _build(self, seen: Look, args: tuple, kwargs: dict) -> None:
        nodes = {
            n: v for n, v in self.prototype_trace.iter_stochastic_nodes() if not (v["infer"] or {}).get("enumerate")
        }
        frame = choose_plate(nodes, self.amortize)
        local = {n: v for n, v in nodes.items() if frame.name in {f.name for f in v["cond_indep_stack"]}}
        families = family_per_site(self.family, list(local))
        self.local_sites = tuple(local_site(node, frame, families[name]) for name, node in local.items())
        self._cover = tuple(cover(nodes))
        self.nesting = max(-plate.dim for plate in seen.plates.values())
        made_here = self._modules.get("encoder") is None
        self._observed = observed_sites(seen, frame.name) if made_here else ()
        self._first = self._reading(seen, args, kwargs, frame.name)
        self._looks = {signature((args, kwargs)): self._first}
        hidden = [
            name for name, _ in self.prototype_trace.iter_stochastic_nodes() if name in local or name not in nodes
        ]
        others = {name: node for name, node in nodes.items() if name not in local}
        guide = make_global(self._modules.get("global_guide") or self._make_global, self.model, others, hidden)
        if guide is not None:
            if self._modules.get("global_guide") is not guide:
                self.global_guide = guide
            set_up_global(guide, others, hidden, args, kwargs)
        if made_here:
            self.encoder = default_encoder(self._observed, self.local_sites, self._first, seen)
        flows = [module for site in self.local_sites for module in site.family.modules()]
        for module in flows:
            module.to(next(self._modules["encoder"].parameters(), torch.zeros(())))
        self.flows = nn.ModuleList(flows) if flows else None
        read = seen_sites(self.dependence, list(local), list(others))
        if read:
            earlier = [earlier_of(nodes[name], None) for name in others if name in read]
            earlier += [earlier_of(local[site.name], site) for site in self.local_sites]
            like = next(self._modules["encoder"].parameters(), torch.zeros(()))
            self.links = Dependence(self.local_sites, earlier, read, like)
        self._check_names()
        for name in hidden:
            forget_values(self.prototype_trace.nodes[name])

    def _check_prototype(self, part_trace: Any) -> None:
        """Pyro calls this on the owner of a guide; `set_up_global` has compared the sites by then or will."""

    def _check_names(self) -> None:
        """Refuse to share the param store's names with another module, whose parameters would be trained instead."""
        name = foreign_parameter(self, MODULES)
        if name is not None:
            refuse_foreign(name)

    @property
    def enumerated(self) -> list[str]:
        """The sites that the model enumerates, which no guide draws."""
        return [n for n, v in self.prototype_trace.iter_stochastic_nodes() if (v["infer"] or {}).get("enumerate")]

    def event_dim(self, name: str) -> int:
        """Return the event dims of a latent."""
        return self.prototype_trace.nodes[name]["fn"].event_dim

    @property
    def num_features(self) -> dict[str, int]:
        """The number of context columns of one value of each site, in order; known after the first call."""
        return {site.name: site.width for site in self.local_sites}

    # What a call sees -----------------------------------------------------------------------------------------

    def _reading(self, seen: Look, args: tuple, kwargs: dict, plate: str) -> Reading:
        sources = {o.name: find_source(seen.messages[o.name], seen, plate, args, kwargs) for o in self._observed}
        masked = [site.name for site in self.local_sites if site.is_masked]
        runs = [*masked, *(name for name, source in sources.items() if source is None)]
        return Reading(seen.plates, plate, sources, tuple(runs))

    def _look(self, args: tuple, kwargs: dict) -> Reading:
        """Return how a call opens its plates, and where its data are."""
        key = signature((args, kwargs))
        reading = self._looks.get(key)
        if reading is None:
            if len(self._looks) >= MAX_LOOKS:
                self._looks.clear()
            if self._model is None:
                inputs = () if self._observed else self._inputs(args, kwargs)
                reading = self._first.resized(inputs, args, kwargs)
            else:
                seen = self._run({*self._cover, *(o.name for o in self._observed), *self._first.runs}, args, kwargs, {})
                reading = self._reading(seen, args, kwargs, self._first.plate)
            self._looks[key] = reading
        return reading

    def _messages(self, reading: Reading, args: tuple, kwargs: dict, plates: Mapping[str, Any] | None) -> dict:
        """Return the sites that have to be seen in every call, for the minibatch that the plates have in use."""
        if not reading.runs:
            return {}
        if plates is None:
            reading.refuse_random_rows()
        batch = {n: p.indices for n, p in (plates or {}).items() if isinstance(p.indices, Tensor)}
        return self._run({*self._cover, *reading.runs}, args, kwargs, batch).messages

    def _run(self, wanted: set[str], args: tuple, kwargs: dict, batch: Mapping[str, Tensor]) -> Look:
        if self._model is None:
            refuse_run(sorted(wanted)[0])
        seen = look(self._reader, self.model, wanted, self._first.plates, args, kwargs, batch)
        check_shapes(seen, self.prototype_trace.nodes)
        return seen

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self.master is not None or self.create_plates is not None:
            return super()._create_plates(*args, **kwargs)
        self.plates = {name: self._open(plate) for name, plate in self._look(args, kwargs).plates.items()}
        return self.plates

    def _open(self, plate: DataPlate) -> Any:
        """Open a plate, or return it as it was opened before, if it draws nothing."""
        if plate.source == "drawn":
            return open_plate(plate)
        found = self._opened.get(plate)
        if found is None:
            if len(self._opened) >= MAX_LOOKS:
                self._opened.clear()
            found = self._opened[plate] = open_plate(plate)
        return found

    # The guide ------------------------------------------------------------------------------------------------

    def _inputs(self, args: tuple, kwargs: dict) -> tuple:
        if self.encoder_input is not None:
            inputs = self.encoder_input(*args, **kwargs)
            return inputs if isinstance(inputs, tuple) else (inputs,)
        if not args:
            refuse_no_argument(kwargs)
        return args[:1]

    def _contexts(self, args: tuple, kwargs: dict, reading: Reading, messages: Mapping, plates: Any) -> dict:
        """Return each local site's context ``(*batch, columns)``; without plates, of all rows that there are."""
        if self._observed:
            inputs = (reading.observed(messages, args, kwargs, plates),)
        else:
            inputs = self._inputs(args, kwargs)
            inputs = inputs if plates is None else take_rows(inputs, plates[reading.plate])
        sizes = {name: plate.subsample_size for name, plate in plates.items()} if plates is not None else None
        return split_context(encode(self.encoder, inputs), self.local_sites, reading, sizes)

    def begin(self, args: tuple, kwargs: dict) -> Call:
        """Look at the model, open the plates, draw the latents outside the data plate, and encode the data."""
        reading = self._looks.get(signature((args, kwargs)))  # of arguments of known shapes, which are not empty
        if reading is None:
            self.prepare(args, kwargs)
            reading = self._look(args, kwargs)
        if self.master is not None or self.create_plates is not None:
            plates = super()._create_plates(*args, **kwargs)
            if self.create_plates is None and self.master().create_plates is None:
                require_size(plates[reading.plate], reading.plates[reading.plate])
        else:
            plates = {name: self._open(plate) for name, plate in reading.plates.items()}
            self.__dict__["plates"] = plates  # past the checks of modules, which take longer than the rest
        values = {} if self.global_guide is None else dict(self.global_guide(*args, **kwargs))
        messages = self._messages(reading, args, kwargs, plates)
        _ = self.flows  # Pyro registers the parameters of a module when it is read
        contexts = self._contexts(args, kwargs, reading, messages, plates)
        masks = {site.name: messages[site.name]["mask"] for site in self.local_sites if site.is_masked}
        return Call(args, kwargs, reading, plates, masks, contexts, values)

    def distribution(self, site: LocalSite, contexts: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> Any:
        """Return a site's distribution, given the values of those before it as their families draw them."""
        context = contexts[site.name]
        if self.links is not None:
            context = self.links(site.name, context, seen)
        return site.family.distribution(context, site.event_shape)

    def draw(self, call: Call, contexts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Draw the local sites from their contexts; return all values by site name."""
        result, seen = dict(call.values), dict(call.values)
        for site in self.local_sites:
            fn = self.distribution(site, contexts, seen)
            with self._around(site, call):
                result[site.name], seen[site.name] = sample_site(site, fn)
        return result

    def _around(self, site: LocalSite, call: Call) -> Any:
        """Return a context with the plates of a site, and its mask."""
        if len(site.plates) == 1 and not site.is_masked:
            return call.plates[next(iter(site.plates))]
        with contextlib.ExitStack() as stack:
            for name in site.plates:
                stack.enter_context(call.plates[name])
            if site.is_masked:
                stack.enter_context(poutine.mask(mask=call.masks[site.name]))
            return stack.pop_all()

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every site; takes the arguments of the model.

        Returns:
            Values by site name.
        """
        call = self.begin(args, kwargs)
        return self.draw(call, call.contexts)

    @torch.no_grad()
    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the median of each coordinate for all rows that the encoder reads, by site name."""
        return {name: value[0] for name, value in self.quantiles([0.5], *args, **kwargs).items()}

    @torch.no_grad()
    def quantiles(self, quantiles: Sequence[float] | Tensor, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        r"""Return quantiles of each coordinate for all rows that the encoder reads.

        Args:
            quantiles: Probabilities, Q of them.
            args, kwargs: The arguments of the model.

        Returns:
            By site name, ``(Q, *plates, *event)``: those of the family's value, mapped to the site's support. With
            ``dependence="structured"`` those of later sites hold at the medians of the earlier ones.
        """
        self.prepare(args, kwargs)
        reading = self._look(args, kwargs)
        contexts = self._contexts(args, kwargs, reading, self._messages(reading, args, kwargs, None), None)
        return self.levels(torch.as_tensor(quantiles).tolist(), args, kwargs, contexts)

    def levels(self, quantiles: list[float], args: tuple, kwargs: dict, contexts: Mapping[str, Tensor]) -> dict:
        """Return quantiles of every latent, the local ones from given contexts."""
        result, seen = {}, {}
        if self.global_guide is not None:
            only_median = quantiles == [0.5]
            seen = self.global_guide.median(*args, **kwargs) if only_median or self.links is not None else {}
            result = {n: v.unsqueeze(0) for n, v in seen.items()} if only_median else None
            result = dict(self.global_guide.quantiles(quantiles, *args, **kwargs)) if result is None else result
        for site in self.local_sites:
            fn, like = self.distribution(site, contexts, seen), contexts[site.name]
            asked = torch.tensor([*quantiles, 0.5], dtype=like.dtype, device=like.device)
            values = site.family.quantile(fn, asked.reshape(-1, *[1] * len(fn.shape())))
            seen[site.name], values = values[-1], values[:-1]
            result[site.name] = values if site.transform is None else site.transform(values)
        return result

    # Copies ---------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the model; unlike in Pyro, this guide keeps it."""
        state = state_of(self)
        if self.global_guide is not None:
            state["_modules"] = {**state["_modules"], "global_guide": bare(self._modules["global_guide"])}
        return {**state, "_reader": None, "_opened": {}, "plates": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoAmortized:
        result = memo[id(self)] = self.__class__.__new__(self.__class__)
        result.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        result._model, result._reader = self._model, self._reader
        if self.global_guide is not None:
            give_models(self.global_guide, result.global_guide)
        return result

    def extra_repr(self) -> str:
        if self._first is None:
            return f"family={'by support' if self.family is None else self.family}"
        sites = "".join(f", {site.name}: {site.width} columns of {site.family}" for site in self.local_sites)
        return f"plate={self._first.plate!r}{sites}"
