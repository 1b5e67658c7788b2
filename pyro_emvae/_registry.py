r"""What parts there are: frozen records without behaviour, and one function to add one's own."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ._checks import EmvaeError, fail, nearest

__all__ = ["Entry", "Traits", "create", "entries", "lookup", "register"]

NEEDS = {
    "estimator": ("traits", "init", "surrogate", "update"),
    "objective": ("bounds", "terms"),
    "step": ("traits", "init", "expect", "maximise"),
    "family": ("traits", "num_features", "distribution"),
    "evidence": ("bounds", "estimate"),
    "problem": ("model", "guide", "args"),
}
KINDS = tuple(NEEDS)
LATER = {"problem": "pyro_emvae.problems", "family": "pyro_emvae.families"}


@dataclass(frozen=True)
class Traits:
    """What a part needs and promises. Tests, tables and policies read nothing else.

    Args:
        unbiased: The expectation of the gradient (or value) is the exact one.
        needs_rsample: The site's distribution must have a reparameterised sampler.
        support: ``"any"``, ``"discrete"``, ``"binary"``, ``"categorical"`` or ``"continuous"``; for a family also
            ``"positive"``, ``"unit_interval"``, ``"simplex"``, ``"circle"``, ``"one_hot"``.
        draws: How the particles of a site are drawn: ``"independent"``; ``"coupled"``: together, each distributed as
            before; ``"noise"``: their noise together, so that their distributions may differ; ``"weighted"``: together,
            with weights; ``"relaxed"``: values with a path, of another distribution; ``"enumerated"``: not at all,
            but summed over.
        probes: ``"no"``; ``"yes"``: the model is run at further values; ``"differentiable"``: and differentiated there;
            ``"twice"``: and its derivative differentiated; ``"draws"``: the model is differentiated by the draws.
        noisy: Its surrogate draws random numbers of its own.
        controls: It returns terms whose coefficients are learned.
        doubly: An objective of several particles is differentiated through their values with the weights of doubly
            reparameterised gradients.
        min_particles: The least number of particles.
        objectives: The objectives that it can differentiate; ``"multi_sample"``: all of several particles that are no
            sum of terms, such as ``"iwae"``; ``"any"``: all.
        recordable: It has no ``.item()`` and no data-dependent branch.
        higher_order: Second derivatives of the surrogate are right too.
        splits_paths: Its terms differ between the path through the value and the direct one.
        stateful: It carries tensors from step to step.
        needs_signal: It weighs log q by the learning signal, so that signal has to be computed.
        auto: Its place among the candidates of the policy ``"auto"``, smaller first; None: never chosen.
        slots: For a half-step, the slots that it fits: ``"E"``, ``"M"``.
        arguments: What has to be given to make one, so that a name alone does not.
        latents: For an E-step, the latents that it takes: ``"any"``, ``"discrete"``, ``"continuous"``, or those with a
            ``"conjugate"`` prior; ``"mean_field"``: those and discrete ones.
        needs_guide: For an E-step, it has no posterior without the user's guide.
        free_guide: For an E-step, the guide has to be one of free parameters, an `AutoMeanField`.
        amortized: For an E-step, the guide has to be amortized: parameters of one datum alone learn nothing.
        exact: For a half-step, it is exact: an E-step's posterior is the true one, an M-step's value the maximum.
        deterministic: For a half-step, it draws nothing, and does the same if given the same. Exact ones do.
        monotone: For a half-step, it never lowers the objective: an E-step the bound that it reports, an M-step the
            expected log joint under the posterior that it is given. Exact ones are.
        tempers: For an E-step, it heeds the factor of an annealed run itself: its posterior has that power.
    """

    unbiased: bool = True
    needs_rsample: bool = False
    support: str = "any"
    draws: str = "independent"
    probes: str = "no"
    noisy: bool = False
    controls: bool = False
    doubly: bool = False
    min_particles: int = 1
    objectives: tuple[str, ...] = ("elbo",)
    recordable: bool = True
    higher_order: bool = False
    splits_paths: bool = False
    stateful: bool = False
    needs_signal: bool = True
    auto: int | None = None
    slots: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    latents: str = "any"
    needs_guide: bool = False
    free_guide: bool = False
    amortized: bool = False
    exact: bool = False
    deterministic: bool = False
    monotone: bool = False
    tempers: bool = False


@dataclass(frozen=True)
class Entry:
    """One registered part: its kind, name, factory, traits, a line about it and its source."""

    kind: str
    name: str
    factory: Callable[..., Any] = field(repr=False)
    traits: Traits = Traits()
    aliases: tuple[str, ...] = ()
    summary: str = ""
    source: str = ""


_ENTRIES: dict[str, dict[str, Entry]] = {kind: {} for kind in KINDS}
_NAMES: dict[str, dict[str, str]] = {kind: {} for kind in KINDS}


def register(
    kind: str,
    name: str,
    factory: Callable[..., Any],
    traits: Traits | None = None,
    *,
    aliases: tuple[str, ...] = (),
    summary: str = "",
    source: str = "",
) -> Entry:
    r"""Add a part under a name that every argument of its kind accepts from then on.

    Args:
        kind: One of ``"estimator"``, ``"objective"``, ``"step"``, ``"family"``, ``"evidence"``, ``"problem"``.
        name: Snake case; has to be new.
        factory: Called without arguments when the name is given in place of an instance.
        traits: What the part needs and promises; by default ``factory.traits``. Estimators, steps and families have
            to have them. What the factory makes is looked at when the name is first used.
        aliases: Other spellings.
        summary: One line for the tables.
        source: Paper and equation.

    Returns:
        The entry.

    Raises:
        EmvaeError: If the kind is unknown or the name is taken, the factory cannot be called, or there are no traits.

    Example:
        >>> from pyro_emvae._registry import entries
        >>> "pathwise" in [e.name for e in entries("estimator")]
        True
    """
    known = _kind(kind)
    for key in (name, *aliases):
        if key in known:
            fail(
                EmvaeError,
                "register",
                f"add {kind} {key!r}",
                got="a name that is taken",
                because="a name stands for one part",
                fix="Choose another name.",
            )
    if not callable(factory):
        fail(
            EmvaeError,
            "register",
            f"add {kind} {name!r}",
            got=f"the factory {factory!r:.60}",
            because="a factory is called without arguments when the name is given",
            fix="Pass the class, or a function that returns an instance.",
        )
    if traits is None:
        traits = getattr(factory, "traits", None if "traits" in NEEDS[kind] else Traits())
    if not isinstance(traits, Traits):
        fail(
            EmvaeError,
            "register",
            f"add {kind} {name!r}",
            got=f"traits {traits!r:.60}",
            because="tests, tables and policies choose parts by their traits",
            fix="Write traits = pyro_emvae.Traits(...) in the class, or register(..., traits=...).",
        )
    entry = Entry(kind, name, factory, traits, tuple(aliases), summary, source)
    _ENTRIES[kind][name] = entry
    known.update({key: name for key in (name, *aliases)})
    return entry


def lookup(kind: str, name: str) -> Entry:
    """Return the entry of a name or alias, or raise with the nearest known name."""
    known = _kind(kind)
    if name not in known:
        fail(
            EmvaeError,
            kind,
            f"be {name!r}",
            got="an unknown name",
            because=f"no {kind} of that name is registered",
            fix=nearest(name, known),
        )
    return _ENTRIES[kind][known[name]]


def create(kind: str, part: Any) -> Any:
    """Return an instance: `part` itself, or what its registered name stands for, which has what its kind needs."""
    if not isinstance(part, str):
        return part
    entry = lookup(kind, part)
    if entry.traits.arguments:
        fail(
            EmvaeError,
            kind,
            f"be made from the name {part!r}",
            got="no arguments",
            because=f"it needs {', '.join(entry.traits.arguments)}",
            fix=f"Pass an instance: {entry.factory.__name__}({', '.join(entry.traits.arguments)}).",
        )
    made = entry.factory()
    missing = [name for name in NEEDS[kind] if not hasattr(made, name)]
    if missing:
        fail(
            EmvaeError,
            kind,
            f"be {part!r}",
            got=f"{made!r:.60} without {', '.join(map(repr, missing))}",
            because=f"a registered factory returns an instance that has all that {kind} parts need",
            fix="Register the class itself, or a function that returns an instance; CONTRIBUTING.md has skeletons.",
        )
    return made


def entries(kind: str) -> tuple[Entry, ...]:
    """Return all entries of a kind in the order of their registration."""
    _kind(kind)
    return tuple(_ENTRIES[kind].values())


def _kind(kind: str) -> dict[str, str]:
    if kind not in _NAMES:
        fail(
            EmvaeError,
            "register",
            f"know kind {kind!r}",
            got="an unknown kind",
            because="parts are sorted by kind",
            fix=nearest(kind, KINDS),
        )
    if kind in LATER:  # those that come with the package are registered by its import
        importlib.import_module(LATER[kind])
    return _NAMES[kind]
