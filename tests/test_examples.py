r"""Every example runs from an empty directory with its loops shortened, and writes what it says it writes."""

from __future__ import annotations

import csv
import gzip
import os
import struct
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from scipy import sparse

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
MAX_LINES = 150
OUTPUTS = {
    "deep_latent_gaussian": {"evidence.png"},
    "digits_vae": {
        "elbo_held_out.png",
        "elbo_training.png",
        "variance_ladder.png",
        "latent_map.png",
        "reconstructions.png",
        "gradients.csv",
        "fit.nc",
    },
    "elbo_identity": {"elbo.png"},
    "em_mixture": {"elbo.png", "components.png", "restarts.csv"},
    "em_ppca": {"acceleration.png", "latent_map.png"},
    "mean_field": {"deviations.png"},
    "monte_carlo_em": {"draws.png"},
    "vae_as_em": {"evidence.png", "evidence.csv"},
    "posterior_collapse": {"information.png"},
    "gradient_estimators": {"elbo.png", "variance_ladder.png", "variance.csv"},
    "discrete_latents": {"bounds.png", "variance_ladder.png", "bounds.csv"},
    "systematic_study": {"answers.png", "noise.png", "study.csv", "study.json", "noise.json"},
    "single_cell_counts": {"latents.png"},
}
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module", params=EXAMPLES, ids=lambda path: path.stem)
def example(request: pytest.FixtureRequest) -> Path:
    return request.param


@pytest.fixture(scope="module")
def finished(example: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run an example in a process of its own and return its working directory and what it printed."""
    directory = tmp_path_factory.mktemp(example.stem)
    return directory, run(example, directory)


def run(example: Path, directory: Path, *options: str) -> str:
    """Run an example, its loops shortened, and return what it printed."""
    environment = {**os.environ, "PYRO_EMVAE_SMOKE": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    # No file may need netCDF4: a clean machine has h5netcdf only.
    code = "import runpy, sys; sys.modules['netCDF4'] = None; runpy.run_path(sys.argv[1], run_name='__main__')"
    command = [sys.executable, "-c", code, str(example), *options]
    process = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, f"{process.stdout}\n{process.stderr}"
    return process.stdout


def files(directory: Path, ending: str) -> list[Path]:
    return sorted(directory.rglob(f"*.{ending}"))


def test_there_are_examples() -> None:
    assert EXAMPLES


def test_layout(example: Path) -> None:
    text = example.read_text(encoding="utf-8")
    cells = [line for line in text.splitlines() if line.startswith("# %%")]
    assert text.startswith("# %% [markdown]\n") and cells.count("# %%") >= 2
    assert len(text.splitlines()) <= MAX_LINES
    for word in ("Question:", "Answer:", "Running time:", "PYRO_EMVAE_SMOKE", "assert "):
        assert word in text, f"{example.name} lacks {word!r}"


def test_writes_what_it_promises(example: Path, finished: tuple[Path, str]) -> None:
    directory, _ = finished
    written = {path.name for path in directory.rglob("*") if path.is_file()}
    assert OUTPUTS[example.stem] <= written


def test_says_where_its_results_are(finished: tuple[Path, str]) -> None:
    directory, printed = finished
    results = [path for path in directory.rglob("*") if path.is_file()]
    assert results and all(path.stat().st_size > 0 for path in results)
    for folder in {path.parent.relative_to(directory) for path in results}:
        assert str(folder) in printed.splitlines()[-1]


def test_figures_and_tables(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    for path in files(directory, "png"):
        assert path.read_bytes().startswith(PNG)
    for path in files(directory, "csv"):
        rows = list(csv.DictReader(path.read_text(encoding="utf-8").splitlines()))
        assert rows and all(None not in row and None not in row.values() for row in rows)


def test_netcdf(finished: tuple[Path, str]) -> None:
    import arviz as az

    directory, _ = finished
    for path in files(directory, "nc"):
        data = az.from_netcdf(str(path), engine="h5netcdf")
        assert {"posterior", "sample_stats", "observed_data", "fit_stats"} <= set(data.groups())
        assert set(data["fit_stats"]["phase"].values.ravel()) <= {0, 1, 2}
        assert bool(data["fit_stats"]["elbo"].notnull().all())
        data.close()


def test_reads_mnist_from_a_folder(tmp_path: Path) -> None:
    """The figures of a run on 120 images of 6 x 5 pixels, written as MNIST is."""
    random = np.random.default_rng(0)
    for part, count in (("train", 120), ("t10k", 30)):
        sizes = struct.pack(">III", count, 6, 5)
        pixels = random.integers(0, 256, 30 * count, dtype=np.uint8).tobytes()
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + sizes + pixels))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + struct.pack(">I", count) + bytes(count))
    printed = run(ROOT / "examples" / "vae_as_em.py", tmp_path, "--data", str(tmp_path))
    assert "120 images of 30 pixels" in printed
    written = (tmp_path / "results" / "vae_as_em" / "evidence.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(written.splitlines()))
    assert {row["method"] for row in rows} == {"AEVB", "wake-sleep", "MCEM"} and {row["N"] for row in rows} == {"120"}


def test_reads_cells_from_a_file(tmp_path: Path) -> None:
    """A small AnnData file; the counts are in a layer, and the batch is a column of strings."""
    random = np.random.default_rng(0)
    csr = sparse.csr_matrix(random.poisson(1.0, (200, 30)))
    with h5py.File(tmp_path / "cells.h5ad", "w") as file:
        group = file.create_group("layers/counts")
        group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": csr.shape})
        for name in ("data", "indices", "indptr"):
            group[name] = getattr(csr, name)
        file["obs/donor"] = np.array(random.choice(["a", "b"], 200), dtype=h5py.string_dtype())
    options = ("--data", str(tmp_path / "cells.h5ad"), "--matrix", "layers/counts", "--batch", "donor")
    printed = run(ROOT / "examples" / "single_cell_counts.py", tmp_path, *options)
    assert "BackedCounts(200 cells, 30 genes, 2 batches" in printed and "Canonical" not in printed
    assert (tmp_path / "results" / "single_cell_counts" / "latents.png").exists()
