r"""Images and labels in the IDX format of MNIST and the data sets that followed it."""

from __future__ import annotations

import gzip
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .._checks import DataError, fail
from .digits import Digits, binarized

__all__ = ["load_idx_binary", "read_idx"]

TYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
GZIP = b"\x1f\x8b"
MAX_DIMS = 8


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    r"""Return the array in an IDX file, compressed by gzip or not.

    The file starts with two zero bytes, a byte that says the type of the numbers and one that says how many dims there
    are, then as many sizes, 4 bytes each; the numbers follow, the most significant byte first.

    Args:
        path: The file. What tells a compressed one is its first two bytes, not its name.

    Returns:
        A tensor of the file's type and sizes.

    Raises:
        DataError: There is no such file, it is no IDX file, is cut off, or longer than its sizes say.

    Source: LeCun, Cortes and Burges, "The MNIST database of handwritten digits".

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile() as file:
        ...     _ = file.write(bytes([0, 0, 8, 2, 0, 0, 0, 1, 0, 0, 0, 3, 7, 8, 9]))
        ...     file.flush()
        ...     read_idx(file.name)
        tensor([[7, 8, 9]], dtype=torch.uint8)
    """
    content = _read(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[2] not in TYPES or not 1 <= content[3] <= MAX_DIMS:
        _refuse(
            path,
            f"the first bytes {content[:4].hex(' ') or 'of an empty file'}",
            "an IDX file starts with 00 00, "
            f"a type ({', '.join(f'{key:02x}' for key in TYPES)}) and a number of dims up to {MAX_DIMS}",
        )
    kind, dims = np.dtype(TYPES[content[2]]), content[3]
    start = 4 + 4 * dims
    if len(content) < start:
        _refuse(path, f"{len(content)} bytes", f"a header of {dims} dims takes {start}")
    sizes = tuple(int.from_bytes(content[at : at + 4], "big") for at in range(4, start, 4))
    expected = start + kind.itemsize * math.prod(sizes)
    if len(content) != expected:
        _refuse(path, f"{len(content)} bytes", f"{kind.name} of sizes {sizes} with their header take {expected}")
    array = np.frombuffer(content, kind, offset=start).reshape(sizes)
    return torch.from_numpy(array.astype(kind.newbyteorder("=")))


def _read(path: str | os.PathLike[str]) -> bytes:
    try:
        content = Path(path).read_bytes()
        return gzip.decompress(content) if content[:2] == GZIP else content
    except OSError as cause:
        _refuse(path, f"{type(cause).__name__}: {cause}", "the file has to be there and whole", cause)
    except EOFError as cause:
        _refuse(path, f"{len(content)} compressed bytes without an end", "the file has to be whole", cause)


def _refuse(path: object, got: str, because: str, cause: BaseException | None = None) -> None:
    fix = "Get the file once more, and do not unpack it halfway."
    fail(DataError, "read_idx", f"read {str(path)!r}", got=got, because=because, fix=fix, cause=cause)


def load_idx_binary(
    folder: str | os.PathLike[str],
    num_train: int | None = None,
    *,
    binarize: str = "threshold",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Digits:
    r"""Return MNIST, or what has its form, as binary images; nothing is downloaded.

    Args:
        folder: Where the four files are: ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``,
            ``t10k-images-idx3-ubyte`` and ``t10k-labels-idx1-ubyte``; a dot may stand in place of the dash before
            ``idx``, and ``.gz`` at the end.
        num_train: The first so many training images; all by default.
        binarize: ``"threshold"`` (grey value above 127 of 255) or ``"stochastic"`` (Bernoulli with the grey value as
            probability, drawn once).
        seed: Of the stochastic binarization.
        dtype: Of the images.
        device: Of images and labels.

    Returns:
        Images, one per row, and labels, in the order of the files.

    Raises:
        DataError: A file is missing or no IDX file; images are no bytes in three dims, or labels none in one; there
            are not as many labels as images; training and test images differ in size; `num_train` is above what there
            is.
        EmvaeError: `binarize` is unknown.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     try:
        ...         load_idx_binary(folder)
        ...     except DataError as error:
        ...         print("train-images-idx3-ubyte" in str(error))
        True
    """
    images, labels = zip(*(_pair(Path(folder), part) for part in ("train", "t10k")), strict=True)
    one, two = (tuple(x.shape[1:]) for x in images)
    if one != two:
        _refuse_data(folder, f"training images of {one} pixels and test images of {two}", "one model is for both")
    count = len(images[0]) if num_train is None else num_train
    if not 1 <= count <= len(images[0]):
        _refuse_data(folder, f"num_train={num_train}", f"there are {len(images[0])} training images")
    generator = torch.Generator().manual_seed(seed)
    train, test = (binarized("load_idx_binary", x.flatten(1).double() / 255, binarize, generator) for x in images)
    train_labels, test_labels = (x.long().to(device) for x in labels)
    return Digits(
        train=train[:count].to(device, dtype),
        test=test.to(device, dtype),
        train_labels=train_labels[:count],
        test_labels=test_labels,
        num_train=count,
        num_test=len(test),
    )


def _pair(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Return the images ``(N, height, width)`` and the labels ``(N)`` of one part."""
    found = []
    for what, dims in (("images", 3), ("labels", 1)):
        path = _find(folder, f"{part}-{what}", f"idx{dims}-ubyte")
        array = read_idx(path)
        if array.dtype != torch.uint8 or array.dim() != dims or array.numel() == 0:
            got = f"{array.dtype} of shape {tuple(array.shape)} in {path.name}"
            _refuse_data(folder, got, f"{what} are bytes in {dims} dim{'s' if dims > 1 else ''}, at least one of them")
        found.append(array)
    images, labels = found
    if len(images) != len(labels):
        _refuse_data(folder, f"{len(images)} {part} images and {len(labels)} labels", "each image has a label")
    return images, labels


def _find(folder: Path, stem: str, ending: str) -> Path:
    names = [f"{stem}{joint}{ending}{packed}" for packed in ("", ".gz") for joint in ("-", ".")]
    for name in names:
        if (folder / name).is_file():
            return folder / name
    there = sorted(path.name for path in folder.iterdir())[:8] if folder.is_dir() else "no such folder"
    _refuse_data(folder, f"{there} and no {names[0]}", f"the file is called {', '.join(names[:-1])} or {names[-1]}")


def _refuse_data(folder: object, got: str, because: str) -> None:
    fix = "Put the four files of MNIST, or of a data set of its form, into the folder."
    fail(DataError, "load_idx_binary", f"read {str(folder)!r}", got=got, because=because, fix=fix)
