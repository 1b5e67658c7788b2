r"""What was given to an amortized guide: checked, and sorted by site."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from pyro.infer.autoguide import AutoGuide
from torch import nn

from .._checks import EmvaeError, ModelError, fail, nearest
from .._registry import create
from ..families import Family
from ._global import refuse as refuse_global

__all__ = ["DEPENDENCES", "check_parts", "family_per_site", "made_families", "refuse_no_argument", "seen_sites"]

DEPENDENCES = ("none", "structured")


def check_parts(encoder: Any, encoder_input: Any, dependence: Any, global_guide: Any) -> None:
    r"""Refuse what no call could use.

    Raises:
        EmvaeError: The encoder is no module; `encoder_input` is no function, or has no encoder; an unknown dependence;
            a global guide that can make none.
    """
    if encoder is not None and not isinstance(encoder, nn.Module):
        fail(
            EmvaeError,
            "AutoAmortized",
            "use its encoder",
            got=f"{type(encoder).__name__} {encoder!r:.60}",
            because="the encoder's parameters are found through torch.nn.Module",
            fix="Write nn.Sequential(...), or a subclass of nn.Module; or leave it out for a default one.",
        )
    if encoder_input is not None and (encoder is None or not callable(encoder_input)):
        fail(
            EmvaeError,
            "AutoAmortized",
            "use encoder_input",
            got="no encoder" if encoder is None else f"{encoder_input!r:.60}",
            because="it is a function that returns what the given encoder reads; a default one reads what is observed",
            fix="Write encoder=nn.Sequential(...), encoder_input=lambda x, index: x[index]; or leave both out.",
        )
    named = isinstance(dependence, list | tuple | set | frozenset) and all(isinstance(n, str) for n in dependence)
    if not (named or (isinstance(dependence, str) and dependence in DEPENDENCES)):
        fail(
            EmvaeError,
            "AutoAmortized",
            "use dependence",
            got=f"{dependence!r:.60}",
            because="it says whether later sites see the values of earlier ones",
            fix=nearest(str(dependence), DEPENDENCES),
        )
    if not (global_guide is None or isinstance(global_guide, AutoGuide) or callable(global_guide)):
        refuse_global(global_guide)


def made_families(family: Any) -> Any:
    r"""Return the family, or a dict of families by site; None chooses by the site's support.

    Raises:
        EmvaeError: One is none.
    """
    if isinstance(family, Mapping):
        return {name: _made(own) for name, own in family.items()}
    return None if family is None else _made(family)


def _made(family: Any) -> Family:
    made = create("family", family)
    if not isinstance(made, Family):
        fail(
            EmvaeError,
            "AutoAmortized",
            "use its family",
            got=f"{family!r:.60}",
            because="a family turns a context into a distribution",
            fix='Write family="normal", an instance of pyro_emvae.families.Family, or a mapping from sites to these.',
        )
    return made


def family_per_site(family: Any, sites: list[str]) -> dict[str, Family | None]:
    r"""Return the family of each site, None where its support chooses.

    Raises:
        ModelError: A mapping names a site that is no local latent.
    """
    if not isinstance(family, Mapping):
        return dict.fromkeys(sites, family)
    for name in family:
        if name not in sites:
            fail(
                ModelError,
                "AutoAmortized",
                f"choose a family for site {name!r}",
                got="no latent of that name in the data plate",
                because="family= maps latents that are amortized to families",
                fix=nearest(str(name), sites),
            )
    return {name: family.get(name) for name in sites}


def seen_sites(dependence: Any, local: Sequence[str], others: Sequence[str]) -> set[str]:
    r"""Return the latents whose values later ones see.

    Args:
        dependence: ``"none"``, ``"structured"``, or their names.
        local, others: The latents in the data plate, and outside.

    Raises:
        ModelError: A name of no latent.
    """
    if isinstance(dependence, str):
        return {"none": set(), "structured": {*local, *others}}[dependence]
    for name in dependence:
        if name not in {*local, *others}:
            fail(
                ModelError,
                "AutoAmortized",
                f"let later sites see {name!r}",
                got="no latent of that name",
                because="dependence= names latents whose values are read",
                fix=nearest(name, [*local, *others]),
            )
    return set(dependence)


def refuse_no_argument(kwargs: Mapping[str, Any]) -> NoReturn:
    fail(
        ModelError,
        "AutoAmortized",
        "choose what the encoder reads",
        got=f"no positional argument, and keywords {sorted(kwargs)}",
        because="by default it reads the first positional argument",
        fix="Write encoder_input=lambda **batch: batch[...].",
    )
