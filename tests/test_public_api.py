"""What is public is documented, and every name that people type finds its part."""

from __future__ import annotations

import inspect

import pytest

import pyro_emvae as emvae
from pyro_emvae import _registry
from pyro_emvae._registry import KINDS, Entry, create, entries, lookup, register

ALIASES = {
    "reparam": "pathwise",
    "reparameterized": "pathwise",
    "reinforce": "score",
    "rloo": "leave_one_out",
    "vargrad": "leave_one_out",
    "stl": "sticking_the_landing",
}
REGISTERED = [entry for kind in KINDS for entry in entries(kind)]


@pytest.mark.parametrize("name", [n for n in emvae.__all__ if n != "__version__"])
def test_public_names_have_docstrings(name):
    part = getattr(emvae, name)
    assert inspect.getdoc(part)
    if inspect.ismodule(part):
        for inner in part.__all__:
            thing = getattr(part, inner)
            assert not callable(thing) or inspect.getdoc(thing), f"{name}.{inner}"


@pytest.mark.parametrize("name", [n for n in emvae.__all__ if inspect.isclass(getattr(emvae, n))])
def test_public_methods_have_docstrings(name):
    cls = getattr(emvae, name)
    own = {n: m for n, m in vars(cls).items() if inspect.isfunction(m) and not n.startswith("_")}
    assert [n for n, m in own.items() if not inspect.getdoc(getattr(cls, n))] == []


@pytest.mark.parametrize("entry", REGISTERED, ids=lambda e: f"{e.kind}-{e.name}")
def test_entries_say_what_they_are(entry):
    assert entry.summary and (entry.source or entry.kind == "problem")
    assert lookup(entry.kind, entry.name) is entry
    assert all(lookup(entry.kind, alias) is entry for alias in entry.aliases)


def test_the_table_of_estimators_is_the_registry():
    rows = {row["estimator"]: row for row in emvae.estimators.table()}
    assert set(rows) == {entry.name for entry in entries("estimator")}
    assert rows["rebar"]["probes"] == "twice" and not rows["gumbel_softmax"]["unbiased"]
    assert all(row["min_particles"] == lookup("estimator", name).traits.min_particles for name, row in rows.items())


MADE_BY_NAME = [e for e in REGISTERED if e.kind != "problem" and not e.traits.arguments]


@pytest.mark.parametrize("entry", MADE_BY_NAME, ids=lambda e: f"{e.kind}-{e.name}")
def test_entries_make_instances_whose_traits_are_the_entrys(entry):
    part = entry.factory()
    assert getattr(part, "traits", entry.traits) == entry.traits
    assert create(entry.kind, part) is part


@pytest.mark.parametrize("entry", [e for e in REGISTERED if e.traits.arguments], ids=lambda e: f"{e.kind}-{e.name}")
def test_a_name_alone_is_refused_where_arguments_are_needed(entry):
    with pytest.raises(emvae.EmvaeError, match=f"{entry.factory.__name__}.*{entry.traits.arguments[0]}"):
        create(entry.kind, entry.name)


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_names_that_people_type(alias, name):
    assert lookup("estimator", alias).name == name


@pytest.mark.parametrize(
    ("kind", "name", "observed"),
    [("estimator", "pathwize", "Did you mean 'pathwise'"), ("estimators", "score", "Did you mean 'estimator'")],
)
def test_unknown_names_get_the_nearest_known_one(kind, name, observed):
    with pytest.raises(emvae.EmvaeError, match=observed):
        lookup(kind, name)


@pytest.mark.parametrize("factory", [3, None, "pathwise"])
def test_a_factory_that_cannot_be_called_is_refused(factory):
    before = entries("estimator")
    with pytest.raises(emvae.EmvaeError, match=rf"add estimator 'odd': got the factory {factory!r}"):
        register("estimator", "odd", factory)
    assert entries("estimator") == before


@pytest.mark.parametrize("kind", ["estimator", "step", "family"])
@pytest.mark.parametrize("traits", [None, {"unbiased": True}])
def test_a_part_without_traits_is_refused(kind, traits):
    with pytest.raises(emvae.EmvaeError, match=rf"add {kind} 'odd': got traits {traits!r}"):
        register(kind, "odd", lambda: None, traits)


@pytest.mark.parametrize(("kind", "missing"), [("estimator", "'surrogate'"), ("step", "'expect'"), ("family", "'dist")])
def test_what_a_factory_makes_is_looked_at_on_first_use(monkeypatch, kind, missing):
    for names in ("_ENTRIES", "_NAMES"):
        monkeypatch.setitem(getattr(_registry, names), kind, dict(getattr(_registry, names)[kind]))
    register(kind, "odd", lambda: 3, emvae.Traits(auto=None))
    with pytest.raises(emvae.EmvaeError, match=f"be 'odd': got 3 without .*{missing}"):
        create(kind, "odd")


def test_a_name_that_is_taken_is_refused_and_nothing_is_added():
    before = entries("estimator")
    with pytest.raises(emvae.EmvaeError, match="'rloo'"):
        register("estimator", "another", object, aliases=("rloo",))
    assert entries("estimator") == before
    assert all(isinstance(e, Entry) for e in before)
