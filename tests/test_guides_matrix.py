r"""Each loss with every guide and family: docs/guides_matrix.md says what is measured."""

from __future__ import annotations

import guides_table
import pyro
import torch
from pyro.infer import Trace_ELBO

from pyro_emvae._registry import entries
from pyro_emvae.guides import AutoMeanField


def test_the_table_is_what_is_measured():
    cells = guides_table.table()
    written, measured = guides_table.PATH.read_text(encoding="utf-8"), guides_table.render(cells)
    changed = "\n".join(guides_table.changes(written, measured))
    assert not changed, f"cells changed; if they are right, run `python tests/guides_table.py`:\n{changed}"
    assert {family for _, family in cells} >= {entry.name for entry in entries("family")}


def test_the_value_and_the_gradients_are_judged():
    """Planted defects: a loss that leaves a term out, one without a gradient, one that raises."""
    model = guides_table.model_of(guides_table.PRIORS["continuous"])
    pyro.set_rng_seed(0)
    guide = AutoMeanField(model)
    guide(guides_table.X)
    reference = guides_table.reference(model, guide)

    class Planted:
        def __init__(self, shift=0.0, error=None):
            self.shift, self.error = shift, error

        def loss_and_grads(self, *pair):
            if self.error:
                raise self.error
            return guides_table.LOSSES["Trace_ELBO"]().loss(*pair) + self.shift

    assert guides_table.measure(guides_table.LOSSES["Trace_ELBO"](), model, guide, reference) == "pass"
    guide.zero_grad()
    found = [
        guides_table.measure(planted, model, guide, reference)
        for planted in (Planted(), Planted(1.0), Planted(error=ValueError("got 3 of\nmore")))
    ]
    assert found == ["no gradient for any parameter", "the value is not the ELBO's", "ValueError: got … of"]
    assert isinstance(guides_table.LOSSES["Trace_ELBO"](), Trace_ELBO) and torch.is_tensor(guides_table.X)
