r"""One call of a guide: its plates, the rows that its encoder reads, and the drawing of its sites."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import pyro
import pyro.distributions as dist
from pyro import poutine
from torch import Tensor, nn

from .._checks import ModelError, fail
from .._pyro import Messenger
from ._plate import DataPlate
from ._reading import Reading
from ._sites import LocalSite

__all__ = [
    "Call",
    "encode",
    "foreign_parameter",
    "forget_values",
    "open_plate",
    "refuse_foreign",
    "require_size",
    "sample_site",
    "take_rows",
]


@dataclass(frozen=True)
class Call:
    r"""What a guide knows before it draws its local sites.

    Args:
        args, kwargs: The arguments of the model.
        reading: How the model opens its plates for them.
        plates: Open plates, by name.
        masks: Masks of masked latents, by name.
        contexts: The local sites' contexts ``(*batch, columns)``.
        values: The values of latents outside the data plate.
    """

    args: tuple
    kwargs: Mapping[str, Any]
    reading: Reading
    plates: Mapping[str, Any]
    masks: Mapping[str, Tensor]
    contexts: Mapping[str, Tensor]
    values: Mapping[str, Tensor]


def open_plate(plate: DataPlate) -> Any:
    """Open a plate. Only indices that the guide itself draws are shown to the model."""
    if plate.source == "drawn":
        return pyro.plate(plate.name, plate.full_size, subsample_size=plate.size, dim=plate.dim, device=plate.device)
    with poutine.block():
        return pyro.plate(plate.name, plate.full_size, subsample=range(plate.size), dim=plate.dim)


def require_size(plate: Any, seen: DataPlate) -> None:
    r"""Compare the data plate that a list of guides opened with that of the model.

    Raises:
        ModelError: It has another number of data in use.
    """
    if plate.subsample_size != seen.size:
        fail(
            ModelError,
            "AutoAmortized",
            f"draw in plate {seen.name!r}",
            got=f"{plate.subsample_size} data in the plate that was opened for it, {seen.size} in the model's",
            because="an AutoGuideList opens the plates of its first call, unless it is told how",
            fix=f'Write AutoGuideList(model, create_plates=lambda x: pyro.plate("{seen.name}", len(x))).',
        )


def take_rows(inputs: tuple, plate: Any) -> tuple:
    """Return the plate's rows of inputs that hold all data."""
    index = plate.indices
    if plate.subsample_size == plate.size or not isinstance(index, Tensor):
        return inputs
    full = [isinstance(t, Tensor) and t.dim() > 0 and len(t) == plate.size for t in inputs]
    return tuple(t[index.to(t.device)] if whole else t for t, whole in zip(inputs, full, strict=True))


def sample_site(site: LocalSite, fn: Any) -> tuple[Tensor, Tensor]:
    """Draw a site; return its value, and that of the family."""
    if site.transform is None:
        value = pyro.sample(site.name, fn, infer=dict(site.annotation))
        return value, value
    free = pyro.sample(f"{site.name}_unconstrained", fn, infer={"is_auxiliary": True, **site.annotation})
    value = site.transform(free)
    log_density = 0.0 if poutine.get_mask() is False else -site.transform.log_abs_det_jacobian(free, value)
    point = dist.Delta(value, log_density=log_density, event_dim=site.event_dim)
    return pyro.sample(site.name, point, infer={"estimator": "pathwise"} if site.annotation else {}), free


def forget_values(node: dict[str, Any]) -> None:
    """Keep the shapes of a latent of the prototype trace, and nothing that has a number for each datum."""
    fn, zero = node["fn"], node["value"].new_zeros(())
    point = dist.Delta(zero.expand(fn.shape()), zero.expand(fn.batch_shape), event_dim=fn.event_dim)
    node.update(fn=point, value=point.v, mask=None, args=(), kwargs={})


def encode(encoder: nn.Module, inputs: tuple) -> Any:
    r"""Return what an encoder makes of its inputs.

    Raises:
        ModelError: The encoder fails on data of another dtype or device than its parameters.
    """
    try:
        return encoder(*inputs)
    except (RuntimeError, ValueError) as cause:
        parameter = next(encoder.parameters(), None)
        for t in inputs:
            floats = isinstance(t, Tensor) and t.is_floating_point() and parameter is not None
            if floats and (t.dtype, t.device) != (parameter.dtype, parameter.device):
                _refuse_kind(f"a tensor of {t.dtype} on {t.device}", parameter, cause)
        raise


def _refuse_kind(got: str, parameter: Tensor, cause: BaseException) -> NoReturn:
    fail(
        ModelError,
        "AutoAmortized",
        "encode the data",
        got=got,
        because=f"the encoder's parameters are of {parameter.dtype} on {parameter.device}",
        fix=f"Write encoder.to(x), before the guide is made; or x.to({str(parameter.device)!r}, {parameter.dtype}).",
        cause=cause,
    )


class _Params(Messenger):
    """Collects the values of param statements."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, Any] = {}

    def _pyro_post_param(self, msg: dict) -> None:
        value = msg["value"]
        self.values[msg["name"]] = value.unconstrained() if hasattr(value, "unconstrained") else value


def foreign_parameter(owner: Any, names: Iterable[str]) -> str | None:
    """Return a name under which the param store has a parameter of another module than the owner's, or None."""
    with poutine.block(), _Params() as seen:
        modules = [getattr(owner, name) for name in names]
    own = {id(leaf) for module in modules if module is not None for leaf in module.parameters()}
    return next((name for name, leaf in seen.values.items() if id(leaf) not in own), None)


def refuse_foreign(name: str) -> NoReturn:
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
