r"""Counts of single cells: the simulation, the model, and files in the layout of `.h5ad`."""

from __future__ import annotations

import h5py
import numpy as np
import pyro
import pytest
import torch
from pyro import poutine
from scipy import sparse, stats

import pyro_emvae as emvae
from pyro_emvae._checks import DataError, EmvaeError
from pyro_emvae.guides import AutoAmortized
from pyro_emvae.problems import BackedCounts, batch_effects, count_model, simulate_counts
from pyro_emvae.testing import assert_mean

CELLS, GENES = 40, 6


@pytest.fixture
def data():
    return simulate_counts(CELLS, GENES, num_latents=2, dtype=torch.float64)


@pytest.fixture
def model():
    return count_model(CELLS, GENES, 3, 2, dtype=torch.float64)


def traced(model, *args):
    return poutine.trace(model).get_trace(*args)


def test_the_model_is_scipys_negative_binomial(data, model):
    trace = traced(model, data.x, data.batch)
    a, z, size = (trace.nodes[name]["value"] for name in ("intercept", "z", "size"))
    mean = size[:, None] * (a[data.batch] + z @ pyro.param("loadings")).softmax(-1)
    r = pyro.param("concentration").detach().numpy()
    expected = stats.nbinom(r, r / (r + mean.detach().numpy())).logpmf(data.x.numpy()).sum()
    trace.compute_log_prob()
    assert float(trace.nodes["x"]["log_prob_sum"].detach()) == pytest.approx(expected, rel=1e-10)


def test_the_simulation_is_the_models():
    """Counts, given all that they were drawn from, through their distribution function: uniform numbers."""
    data = simulate_counts(6000, 5, dtype=torch.float64)
    mean = data.size[:, None] * (data.intercept[data.batch] + data.z @ data.loadings).softmax(-1)
    r, x = data.concentration.numpy(), data.x.numpy()
    law = stats.nbinom(r, r / (r + mean.numpy()))
    uniform = torch.from_numpy(law.cdf(x - 1)) + torch.rand(6000, 5) * torch.from_numpy(law.pmf(x))
    for power in (1, 2, 3):
        expected = torch.full((5,), 1 / (power + 1), dtype=torch.float64)
        assert_mean(uniform**power, expected, detect=0.05)


def test_one_seed_decides_everything():
    state = torch.get_rng_state()
    first, again, other = (simulate_counts(9, 4, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.x, again.x) and not torch.equal(first.x, other.x)
    with pytest.raises(EmvaeError, match="num_genes"):
        simulate_counts(3, 0)


def test_a_minibatch_counts_for_all(data, model):
    index = torch.tensor([3, 0, 17, 30])
    trace = traced(model, data.x[index], data.batch[index], index)
    assert trace.nodes["x"]["scale"] == trace.nodes["z"]["scale"] == CELLS / 4
    assert trace.nodes["intercept"]["scale"] == 1.0


def test_particles_are_vectorized(data, model):
    """With several draws of the intercepts, which all cells share: `vectorize_particles` compares both ways."""
    guide = AutoAmortized(model, None, encoder_input=None)
    value = emvae.elbo(model, guide, data.x, data.batch, num_particles=4, vectorize_particles=True, seed=0)
    assert np.isfinite(value.value)


def test_without_correction_the_batch_is_ignored(data):
    model = count_model(CELLS, GENES, 3, 2, correct=False, dtype=torch.float64)
    trace = traced(model, data.x, data.batch)
    other = traced(poutine.replay(model, trace), data.x, (data.batch + 1) % 3)
    assert trace.nodes["intercept"]["value"].shape == (1, GENES)
    assert torch.equal(trace.log_prob_sum(), other.log_prob_sum())


def test_batch_effects_are_free_of_what_is_not_known(data):
    """Constants added to a batch's intercepts; latents moved in a batch, and its intercepts against it."""
    effects = batch_effects(data.intercept, data.loadings, data.z, data.batch)
    shift = torch.tensor([[3.0], [-1.0], [0.5]], dtype=torch.float64)
    moved = torch.tensor([[1.0, 2.0], [0.0, -1.0], [0.3, 0.3]], dtype=torch.float64)
    intercept = data.intercept + shift - moved @ data.loadings
    again = batch_effects(intercept, data.loadings, data.z + moved[data.batch], data.batch)
    torch.testing.assert_close(again, effects)
    several = batch_effects(intercept.expand(5, -1, -1), data.loadings, data.z.expand(5, -1, -1), data.batch)
    assert several.shape == (5, 2, GENES)
    with pytest.raises(EmvaeError, match=r"\[40, 0, 0\] cells per batch"):
        batch_effects(intercept, data.loadings, data.z, torch.zeros_like(data.batch))


# Files -------------------------------------------------------------------------------------------------------


def write(path, x, batches, old=False, matrix="X"):
    """Write what `adata.write_h5ad` writes of a CSR matrix and a column of categories."""
    csr = sparse.csr_matrix(x)
    with h5py.File(path, "w") as file:
        group = file.create_group(matrix)
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": csr.shape})
        for name in ("data", "indices", "indptr"):
            group.create_dataset(name, data=getattr(csr, name), chunks=True, compression="gzip")
        obs = file.create_group("obs")
        if old:
            obs["batch"] = np.array(batches, dtype=h5py.string_dtype())
            return
        names, codes = np.unique(batches, return_inverse=True)
        column = obs.create_group("batch")
        column.attrs.update({"encoding-type": "categorical", "encoding-version": "0.2.0", "ordered": False})
        column["categories"] = names.astype(h5py.string_dtype())
        column["codes"] = codes.astype(np.int8)


@pytest.mark.parametrize("old", [False, True], ids=["categories", "strings"])
def test_rows_of_a_file_are_those_of_the_matrix(tmp_path, data, old):
    path, names = tmp_path / "a.h5ad", np.array(["b", "c", "a"])
    x = data.x.clone()
    x[5] = 0
    write(path, x.numpy(), names[data.batch], old)
    counts = BackedCounts(path, "batch")
    assert counts.shape == tuple(x.shape) and counts.batch_names == ("a", "b", "c")
    assert [counts.batch_names[i] for i in counts.batch] == list(names[data.batch])
    for index in (torch.randperm(CELLS), torch.arange(CELLS), torch.tensor([7, 5, 5, 39, 0, 6]), torch.tensor([5])):
        assert torch.equal(counts.rows(index, torch.float64), x[index])
    assert counts.rows(torch.arange(0)).shape == (0, GENES)
    counts.close()


def test_one_batch_by_default_and_other_places(tmp_path, data):
    write(tmp_path / "a.h5ad", data.x.numpy(), ["a"] * CELLS, matrix="layers/counts")
    counts = BackedCounts(tmp_path / "a.h5ad", matrix="layers/counts")
    assert counts.batch.unique().tolist() == [0] and torch.equal(counts.rows(torch.arange(9)), data.x[:9].float())


def test_what_cannot_be_read(tmp_path, data):
    path = tmp_path / "a.h5ad"
    with pytest.raises(DataError, match="FileNotFoundError"):
        BackedCounts(path)
    path.write_bytes(b"no HDF5")
    with pytest.raises(DataError, match="OSError"):
        BackedCounts(path)
    write(path, data.x.numpy() + 0.5, ["a"] * CELLS)
    counts = BackedCounts(path)
    with pytest.raises(DataError, match=r"the value \d+\.5"):
        counts.rows(torch.arange(3))
    with pytest.raises(DataError, match="rows 2 to 40"):
        counts.rows(torch.tensor([40, 2]))
    with pytest.raises(EmvaeError, match="a file with obs/batch"):
        BackedCounts(path, "donor")
    with pytest.raises(EmvaeError, match="a file with X, obs"):
        BackedCounts(path, matrix="x")
    counts.close()
    with h5py.File(path, "r+") as file:
        file["obs/batch/codes"][0] = -1
        file.create_dataset("layers/dense", data=data.x.numpy())
        file["X"].attrs["encoding-type"] = "csc_matrix"
    with pytest.raises(DataError, match="got csc_matrix"):
        BackedCounts(path)
    with pytest.raises(DataError, match="got a dense array"):
        BackedCounts(path, matrix="layers/dense")
    with h5py.File(path, "r+") as file:
        file["X"].attrs["encoding-type"] = "csr_matrix"
    with pytest.raises(DataError, match="1 cells without a value"):
        BackedCounts(path, "batch")
