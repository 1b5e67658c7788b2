r"""Counts in AnnData's `.h5ad` files, read from the disk a minibatch at a time."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import DataError, EmvaeError, fail, nearest

__all__ = ["BackedCounts"]

CSR = "csr_matrix"


class BackedCounts:
    r"""The rows of a CSR matrix in an `.h5ad` file, made dense when asked for; the matrix stays on the disk.

    When to use: more cells than fit in memory as a dense matrix. In memory are the rows' places in the file (8 bytes
    per cell), the batches, and what is asked for. Cost: two reads of the file per run of rows that follow
    one another.

    Args:
        path: The file.
        batch: The column of ``obs`` that says the batch of a cell; None: one batch.
        matrix: The matrix' place in the file: ``"X"``, ``"layers/counts"`` or ``"raw/X"``, where the counts are.

    Attributes:
        shape: Cells and genes.
        batch: The batch of each cell as a number, ``(cells,)``.
        batch_names: What the numbers stand for.

    Raises:
        EmvaeError: h5py is not installed; there is no such matrix or column.
        DataError: No such file, or no HDF5 file; the matrix is not CSR; at `rows`, values that are no counts.

    Source: the on-disk format of AnnData, versions 0.1.0 of ``csr_matrix`` and 0.2.0 of ``categorical``; also plain
    columns of strings or numbers.

    Example:
        >>> import h5py, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with h5py.File(f"{folder}/a.h5ad", "w") as file:
        ...         x = file.create_group("X")
        ...         x.attrs.update({"encoding-type": "csr_matrix", "shape": [2, 3]})
        ...         x["data"], x["indices"], x["indptr"] = [5.0, 1.0, 2.0], [0, 2, 1], [0, 2, 3]
        ...     counts = BackedCounts(f"{folder}/a.h5ad")
        ...     counts.rows(torch.tensor([1, 0]))
        tensor([[0., 2., 0.],
                [5., 0., 1.]])
    """

    def __init__(self, path: str | os.PathLike[str], batch: str | None = None, matrix: str = "X") -> None:
        self._file = _open(path)
        try:
            self._read(path, batch, matrix)
        except BaseException:
            self.close()
            raise

    def _read(self, path: object, batch: str | None, matrix: str) -> None:
        self._group = _member(self._file, matrix, path)
        encoding = self._group.attrs.get("encoding-type", self._group.attrs.get("h5sparse_format", "a dense array"))
        if encoding not in (CSR, "csr"):
            fail(
                DataError,
                "BackedCounts",
                f"read {matrix!r} of {str(path)!r} by rows",
                got=str(encoding),
                because="rows are read one by one, which a CSR matrix allows",
                fix="Write it by rows: adata.X = scipy.sparse.csr_matrix(adata.X), then adata.write_h5ad(path).",
            )
        attrs = self._group.attrs
        self.shape = tuple(int(n) for n in attrs["shape" if "shape" in attrs else "h5sparse_shape"])
        self._starts = self._group["indptr"][:].astype(np.int64)
        codes, self.batch_names = _column(self._file, batch, self.shape[0], path)
        self.batch = torch.from_numpy(codes)

    def __len__(self) -> int:
        return self.shape[0]

    def __repr__(self) -> str:
        (cells, genes), filled = self.shape, self._starts[-1] / max(1, self.shape[0] * self.shape[1])
        return f"BackedCounts({cells} cells, {genes} genes, {len(self.batch_names)} batches, {1 - filled:.0%} zeros)"

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def rows(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return the rows of an index, in its order, as a dense tensor."""
        wanted, back = np.unique(index.numpy(), return_inverse=True)
        if len(wanted) and not 0 <= wanted[0] <= wanted[-1] < len(self):
            fail(
                DataError,
                "BackedCounts",
                "read rows",
                got=f"rows {wanted[0]} to {wanted[-1]}",
                because=f"there are {len(self)} cells, counted from 0",
                fix=f"Write an index between 0 and {len(self) - 1}.",
            )
        dense = np.zeros((len(wanted), self.shape[1]))
        runs = np.split(np.arange(len(wanted)), np.flatnonzero(np.diff(wanted) > 1) + 1)
        for run in runs if len(wanted) else ():
            first, last = wanted[run[0]], wanted[run[-1]]
            begin, end = self._starts[first], self._starts[last + 1]
            number = np.diff(self._starts[first : last + 2])
            dense[np.repeat(run, number), self._group["indices"][begin:end]] = self._group["data"][begin:end]
        _check_counts(dense)
        return torch.from_numpy(dense[back]).to(dtype)


def _open(path: str | os.PathLike[str]) -> Any:
    try:
        import h5py
    except ImportError as cause:
        fail(
            EmvaeError,
            "BackedCounts",
            f"read {str(path)!r}",
            got="no h5py",
            because="an .h5ad file is an HDF5 file",
            fix="pip install h5py",
            cause=cause,
        )
    try:
        return h5py.File(path, "r")
    except OSError as cause:
        fail(
            DataError,
            "BackedCounts",
            f"read {str(path)!r}",
            got=f"{type(cause).__name__}: {cause}",
            because="the file has to be there, and in the HDF5 format",
            fix="Write it with adata.write_h5ad(path).",
            cause=cause,
        )


def _member(file: Any, name: str, path: object) -> Any:
    """Return a group or data set of the file."""
    if name not in file:
        parent = name.rpartition("/")[0]
        there = [f"{parent}/{key}" if parent else key for key in file[parent or "/"]] if (parent or "/") in file else []
        fail(
            EmvaeError,
            "BackedCounts",
            f"find {name!r} in {str(path)!r}",
            got=f"a file with {', '.join(there) or 'nothing there'}",
            because="it is read by its name",
            fix=nearest(name, there),
        )
    return file[name]


def _column(file: Any, name: str | None, cells: int, path: object) -> tuple[np.ndarray, tuple[str, ...]]:
    """Return a column of ``obs`` as numbers of its distinct values, and these."""
    if name is None:
        return np.zeros(cells, np.int64), ("all",)
    column = _member(file, f"obs/{name}", path)
    if hasattr(column, "keys"):
        codes, names = column["codes"][:].astype(np.int64), column["categories"]
    else:
        names, codes = np.unique(column[:], return_inverse=True)
    if (codes < 0).any():
        fail(
            DataError,
            "BackedCounts",
            f"use the column {name!r}",
            got=f"{int((codes < 0).sum())} cells without a value",
            because="each cell belongs to a batch",
            fix=f'Leave them out: adata = adata[adata.obs["{name}"].notna()], and write the file anew.',
        )
    return codes.astype(np.int64), tuple(n.decode() if isinstance(n, bytes) else str(n) for n in names[:])


def _check_counts(dense: np.ndarray) -> None:
    bad = dense[(dense < 0) | (dense != np.floor(dense))]
    if bad.size:
        fail(
            DataError,
            "BackedCounts",
            "read counts",
            got=f"the value {bad[0]:g}",
            because="counts are whole numbers, and a matrix of logarithms or of shares has none",
            fix='Write matrix="layers/counts" or matrix="raw/X", where the counts are.',
        )
