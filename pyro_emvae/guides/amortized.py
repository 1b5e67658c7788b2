r"""`AutoAmortized`: an encoder reads a batch and gives every local latent its distribution."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn

from .._checks import EmvaeError, ModelError, fail, require_data
from .._pyro import Messenger
from .._registry import create
from ..families import Family
from ..particles import quiet
from ._plate import DataPlate, PlateReader, look, signature
from ._sites import LocalSite, choose_plate, local_site

__all__ = ["AutoAmortized"]

MAX_LOOKS = 256


class AutoAmortized(AutoGuide):
    r"""A guide for the latents of a data plate, with an encoder shared by all data.

    $$q_\phi(z\mid x)=\prod_n\prod_s q\big(z_{n,s}\mid h_{n,s}\big),\qquad (h_{n,1},h_{n,2},\dots)=f_\phi(x_n).$$

    When to use: one latent or more per datum, many data, new data later. Nothing is stored per datum, so that data of
    any other number of rows can follow.

    The model is looked at once for each new shape of its arguments, up to its first local site: this says how many
    data there are and how the plate is subsampled.

    * ``pyro.plate("data", len(x))``: the encoder reads x.
    * ``pyro.plate("data", N, subsample=index)`` with a minibatch x: the encoder reads x; the scale is N over its rows.
      If x holds all data, hand the batch over: ``encoder_input=lambda x, index: x[index]``.
    * ``pyro.plate("data", N, subsample_size=B)``: the guide draws the indices, the model follows; tensors of N rows
      are indexed before the encoder reads them, other inputs are taken as they are.
    * Anything else, such as a size that an attribute of the model decides: ``create_plates=``, as in all of Pyro's
      autoguides.

    A site with real support is drawn directly, so that estimators and closed-form KL apply to it. Another is drawn as
    ``{name}_unconstrained`` (auxiliary) and mapped by `biject_to`; then its estimator is chosen at that auxiliary
    site. ``infer={"estimator": ...}`` of the model's site is taken over.

    Args:
        model: A Pyro model whose latents lie in one plate.
        encoder: Any module from a batch to a context ``(rows, columns)``; the columns of the sites follow one another
            in the order of the model, see `num_features`. Its parameters appear as ``AutoAmortized.encoder$$$...``.
        family: What q looks like given the context: a registered name or an instance.
        amortize: The plate's name; needed if latents lie in several plates.
        encoder_input: Called with the arguments of the model; returns what the encoder reads, a tuple for several
            arguments. By default the first positional argument.
        create_plates: As in `pyro.infer.autoguide.AutoGuide`.

    `Predictive`, `copy.deepcopy` (the copy shares the model), pickling (without the model, as in Pyro: the plate of a
    new shape of arguments is then told from the number of rows) and `state_dict` work; `AutoGuideList` too, whose
    plates are then used. As in all of Pyro, a plate with ``subsample_size=`` draws anew in `Predictive`: give it whole
    data.

    Raises:
        EmvaeError: The encoder is no module; the family is none.
        DataError: At any call: the data are empty.
        ModelError: At the first call: no local latent, several plates, a latent elsewhere, a discrete one, a support
            that differs between data, or a param store that holds another module under the encoder's name. At any
            call: an encoder output of the wrong shape.

    Source: Kingma and Welling 2013; Pyro's `AutoNormal` for the auxiliary site.

    Example:
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
        encoder: nn.Module,
        family: str | Family = "normal",
        amortize: str | None = None,
        encoder_input: Callable[..., Any] | None = None,
        *,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        _check_parts(encoder, family)
        reader = PlateReader()
        super().__init__(reader(model), create_plates=create_plates)
        self.encoder = encoder
        self.family: Family = create("family", family)
        self.amortize = amortize
        self.encoder_input = encoder_input
        self._reader = reader
        self._sites: tuple[LocalSite, ...] = ()
        self._looks: dict[Any, DataPlate] = {}
        self._first: DataPlate | None = None

    # Set-up ---------------------------------------------------------------------------------------------------

    def _prepare(self, args: tuple, kwargs: dict) -> None:
        """Refuse empty data, with which the model itself could not open its plate, and look at the model once."""
        require_data("AutoAmortized", args[:1] if self.encoder_input is None else (args, kwargs))
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        try:
            with quiet(train=False), torch.no_grad():
                super()._setup_prototype(*args, **kwargs)
            nodes = dict(self.prototype_trace.iter_stochastic_nodes())
            frame = choose_plate(nodes, self.amortize)
            self._check_encoder_names()
            self._sites = tuple(local_site(node, frame) for node in nodes.values())
        except BaseException:
            self.prototype_trace = None
            raise
        for name in ("_INPUT", "_RETURN"):
            self.prototype_trace.remove_node(name)
        self._first = self._reader.plate(frame)
        self._looks = {signature((args, kwargs)): self._first}

    def _check_encoder_names(self) -> None:
        """Refuse to share the param store's names with another module, whose parameters would be trained instead."""
        with poutine.block(), _Params() as seen:
            own = {id(leaf) for leaf in self.encoder.parameters()}
        for name, leaf in seen.values.items():
            if id(leaf) not in own:
                fail(
                    ModelError,
                    "AutoAmortized",
                    "register its encoder",
                    got=f"{name!r} in the param store, a parameter of another module",
                    because="the optimizer would train that one",
                    fix="Call pyro.clear_param_store() before making a new guide; for several guides at a time, "
                    "pyro.settings.set(module_local_params=True). To go on from stored values, call "
                    f"pyro.module({name.partition('$$$')[0]!r}, encoder, update_module_params=True) first.",
                )

    @property
    def num_features(self) -> dict[str, int]:
        """The number of context columns of each site, in order; known after the first call."""
        return {site.name: self.family.num_features(site.event_shape) for site in self._sites}

    # The plate ------------------------------------------------------------------------------------------------

    def _create_plates(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if self.master is not None or self.create_plates is not None:
            return super()._create_plates(*args, **kwargs)
        self.plates = {self._first.name: _open(self._data_plate(args, kwargs))}
        return self.plates

    def _data_plate(self, args: tuple, kwargs: dict) -> DataPlate:
        key = signature((args, kwargs))
        plate = self._looks.get(key)
        if plate is None:
            if len(self._looks) >= MAX_LOOKS:
                self._looks.clear()
            if self._model is None:
                plate = self._first.resized(_num_rows(self._inputs(args, kwargs), self._first.size))
            else:
                names = [site.name for site in self._sites]
                plate = look(self._reader, self.model, names, self._first.name, args, kwargs)
            self._looks[key] = plate
        return plate

    # The encoder ----------------------------------------------------------------------------------------------

    def _inputs(self, args: tuple, kwargs: dict) -> tuple:
        if self.encoder_input is not None:
            inputs = self.encoder_input(*args, **kwargs)
            return inputs if isinstance(inputs, tuple) else (inputs,)
        if not args:
            fail(
                ModelError,
                "AutoAmortized",
                "choose what the encoder reads",
                got=f"no positional argument, and keywords {sorted(kwargs)}",
                because="by default it reads the first positional argument",
                fix="Write encoder_input=lambda **batch: batch[...].",
            )
        return args[:1]

    def _contexts(self, inputs: tuple, rows: int | None) -> dict[str, Tensor]:
        """Return each site's context, ``(rows, 1..., columns)`` with the rows at the plate's dim."""
        context = self.encoder(*inputs)
        widths = self.num_features
        columns = sum(widths.values())
        fits = isinstance(context, Tensor) and context.dim() == 2 and context.shape[1] == columns
        if not fits or rows not in (None, len(context)):
            _wrong_context(context, rows, widths, self._first.name)
        context = context.reshape(len(context), *[1] * (-self._first.dim - 1), columns)
        return dict(zip(widths, context.split(list(widths.values()), -1), strict=True))

    # The guide ------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draw every site; takes the arguments of the model.

        Returns:
            Values by site name.
        """
        self._prepare(args, kwargs)
        plate = self._create_plates(*args, **kwargs)[self._first.name]
        contexts = self._contexts(_take(self._inputs(args, kwargs), plate), plate.subsample_size)
        result = {}
        for site in self._sites:
            fn = self.family.distribution(contexts[site.name], site.event_shape)
            with plate:
                result[site.name] = _sample(site, fn)
        return result

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
            By site name, ``(Q, *plates, *event)``: those of the unconstrained value, mapped to the site's support.
        """
        self._prepare(args, kwargs)
        contexts = self._contexts(self._inputs(args, kwargs), None)
        result = {}
        for site in self._sites:
            context = contexts[site.name]
            fn = self.family.distribution(context, site.event_shape)
            levels = torch.as_tensor(quantiles, dtype=context.dtype, device=context.device)
            values = self.family.quantile(fn, levels.reshape(-1, *[1] * len(fn.shape())))
            result[site.name] = values if site.transform is None else site.transform(values)
        return result

    # Copies ---------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the model; unlike in Pyro, this guide keeps it."""
        model, master = self._model, self.master
        try:
            state = dict(super().__getstate__())
        finally:
            self._model, self.master = model, master
        return {**state, "_reader": None, "plates": {}}

    def __deepcopy__(self, memo: dict[int, Any]) -> AutoAmortized:
        result = memo[id(self)] = self.__class__.__new__(self.__class__)
        result.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        result._model, result._reader = self._model, self._reader
        return result

    def extra_repr(self) -> str:
        sites = "".join(f", {name}: {width} columns" for name, width in self.num_features.items())
        return f"family={self.family}" + (f", plate={self._first.name!r}{sites}" if self._first else "")


class _Params(Messenger):
    """Collects the values of param statements."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Any] = {}

    def _pyro_post_param(self, msg: dict) -> None:
        value = msg["value"]
        self.values[msg["name"]] = value.unconstrained() if hasattr(value, "unconstrained") else value


def _open(plate: DataPlate) -> Any:
    """Open the plate. Only indices that the guide itself draws are shown to the model."""
    if plate.source == "drawn":
        return pyro.plate(plate.name, plate.full_size, subsample_size=plate.size, dim=plate.dim, device=plate.device)
    with poutine.block():
        return pyro.plate(plate.name, plate.full_size, subsample=range(plate.size), dim=plate.dim)


def _take(inputs: tuple, plate: Any) -> tuple:
    """Return the plate's rows of inputs that hold all data."""
    index = plate.indices
    if plate.subsample_size == plate.size or not isinstance(index, Tensor):
        return inputs
    full = [isinstance(t, Tensor) and t.dim() > 0 and len(t) == plate.size for t in inputs]
    return tuple(t[index.to(t.device)] if whole else t for t, whole in zip(inputs, full, strict=True))


def _num_rows(inputs: tuple, default: int) -> int:
    return next((len(t) for t in inputs if isinstance(t, Tensor) and t.dim()), default)


def _sample(site: LocalSite, fn: Any) -> Tensor:
    if site.transform is None:
        return pyro.sample(site.name, fn, infer=dict(site.annotation))
    free = pyro.sample(f"{site.name}_unconstrained", fn, infer={"is_auxiliary": True, **site.annotation})
    value = site.transform(free)
    log_density = 0.0 if poutine.get_mask() is False else -site.transform.log_abs_det_jacobian(free, value)
    point = dist.Delta(value, log_density=log_density, event_dim=site.event_dim)
    return pyro.sample(site.name, point, infer={"estimator": "pathwise"} if site.annotation else {})


def _check_parts(encoder: Any, family: Any) -> None:
    if not isinstance(encoder, nn.Module):
        fail(
            EmvaeError,
            "AutoAmortized",
            "use its encoder",
            got=f"{type(encoder).__name__} {encoder!r:.60}",
            because="the encoder's parameters are found through torch.nn.Module",
            fix="Write nn.Sequential(...), or a subclass of nn.Module.",
        )
    if not isinstance(create("family", family), Family):
        fail(
            EmvaeError,
            "AutoAmortized",
            "use its family",
            got=f"{family!r:.60}",
            because="a family turns a context into a distribution",
            fix='Write family="normal", or an instance of pyro_emvae.families.Family.',
        )


def _wrong_context(context: Any, rows: int | None, widths: dict[str, int], plate: str) -> None:
    got = f"a tensor of shape {tuple(context.shape)}" if isinstance(context, Tensor) else type(context).__name__
    first = rows if rows is not None else "rows"
    columns = " and ".join(f"{width} for {name!r}" for name, width in widths.items())
    fail(
        ModelError,
        "AutoAmortized",
        "read the encoder's output",
        got=got,
        because=f"it must be a tensor of shape ({first}, {sum(widths.values())}): one row for each of the data that "
        f"plate {plate!r} has in use, and columns {columns}",
        fix="Change the last layer's width, or what the encoder reads: encoder_input=lambda x, index: x[index].",
    )
