r"""IDX files: what is read, and what is refused: each file is written here, byte by byte."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from pyro_emvae._checks import DataError, EmvaeError
from pyro_emvae.problems import load_digits_binary, load_idx_binary, read_idx

KINDS = {
    0x08: ("B", torch.uint8, [0, 128, 255, 7, 1, 2]),
    0x09: ("b", torch.int8, [0, -128, 127, 7, 1, 2]),
    0x0B: ("h", torch.int16, [0, -32768, 258, 7, 1, 2]),
    0x0C: ("i", torch.int32, [0, -(2**31), 2**31 - 1, 66051, 1, 2]),
    0x0D: ("f", torch.float32, [0.0, -1.5, 3.25, 7.0, 1.0, 2.0]),
    0x0E: ("d", torch.float64, [0.0, -1.5, 3.1, 7.0, 1.0, 2.0]),
}


def encoded(sizes, values, kind=0x08) -> bytes:
    letter = KINDS[kind][0]
    return bytes([0, 0, kind, len(sizes)]) + struct.pack(f">{len(sizes)}I{len(values)}{letter}", *sizes, *values)


def mnist_like(folder: Path, *, train=6, test=4, size=(3, 2), packed=False, joint="-") -> np.ndarray:
    """Write the four files and return all pixels in order."""
    values = np.random.default_rng(0).integers(0, 256, (train + test) * size[0] * size[1])
    count = 0
    for part, number in (("train", train), ("t10k", test)):
        pixels = number * size[0] * size[1]
        images = encoded((number, *size), values[count : count + pixels].tolist())
        count += pixels
        labels = encoded((number,), [n % 10 for n in range(number)])
        for what, dims, content in (("images", 3, images), ("labels", 1, labels)):
            name = f"{part}-{what}{joint}idx{dims}-ubyte"
            if packed:
                (folder / f"{name}.gz").write_bytes(gzip.compress(content))
            else:
                (folder / name).write_bytes(content)
    return values


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_type(tmp_path, kind, packed):
    _, dtype, values = KINDS[kind]
    content = encoded((2, 3), values, kind)
    (tmp_path / "x").write_bytes(gzip.compress(content) if packed else content)
    assert torch.equal(read_idx(tmp_path / "x"), torch.tensor(values, dtype=dtype).reshape(2, 3))


@pytest.mark.parametrize("sizes", [(5,), (2, 3, 4), (1, 2, 3, 1), (0, 3)])
def test_dims(tmp_path, sizes):
    values = list(range(int(np.prod(sizes))))
    (tmp_path / "x").write_bytes(encoded(sizes, values))
    found = read_idx(str(tmp_path / "x"))
    assert tuple(found.shape) == sizes and found.flatten().tolist() == values


GOOD = encoded((2, 3), [1, 2, 3, 4, 5, 6])


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "an empty file"),
        (b"\0\0\x08", "00 00 08"),
        (b"PNG" + GOOD, "50 4e 47 00"),
        (b"\0\0\x07" + GOOD[3:], "00 00 07 02"),
        (b"\0\0\x08\0" + GOOD[4:], "00 00 08 00"),
        (GOOD[:9], r"got 9 bytes.* 2 dims takes 12"),
        (GOOD[:-1], r"got 17 bytes.*uint8 of sizes \(2, 3\) .* 18"),
        (GOOD + b"\0", r"got 19 bytes.*uint8 of sizes \(2, 3\) .* 18"),
        (encoded((2, 3), [1] * 6, 0x0C)[:20], r"got 20 bytes.*int32 of sizes \(2, 3\) .* 36"),
        (gzip.compress(GOOD, mtime=0)[:-9], "compressed bytes without an end"),
        (gzip.compress(GOOD, mtime=0)[:-8] + b"\0" * 8, "BadGzipFile"),
        (gzip.compress(GOOD[:-1], mtime=0), "got 17 bytes"),
    ],
)
def test_refuses_what_is_no_whole_file(tmp_path, content, says):
    (tmp_path / "odd").write_bytes(content)
    with pytest.raises(DataError, match=says) as caught:
        read_idx(tmp_path / "odd")
    assert str(tmp_path / "odd") in str(caught.value)


def test_no_file(tmp_path):
    with pytest.raises(DataError, match="FileNotFoundError"):
        read_idx(tmp_path / "none")


@pytest.mark.parametrize(("packed", "joint"), [(False, "-"), (True, "-"), (False, "."), (True, ".")])
def test_a_folder(tmp_path, packed, joint):
    values = mnist_like(tmp_path, packed=packed, joint=joint)
    found = load_idx_binary(tmp_path)
    both = torch.cat([found.train, found.test])
    assert torch.equal(both, torch.as_tensor(values > 127).reshape(10, 6).float())
    assert (found.num_train, found.num_test) == (6, 4)
    assert found.train_labels.tolist() == [0, 1, 2, 3, 4, 5] and found.test_labels.tolist() == [0, 1, 2, 3]
    fewer = load_idx_binary(str(tmp_path), 2, dtype=torch.float64)
    assert torch.equal(fewer.train, found.train[:2].double()) and len(fewer.train_labels) == 2
    assert torch.equal(fewer.test, found.test.double())


def test_stochastic_binarization_has_the_grey_values_as_means(tmp_path):
    content = encoded((4000, 1, 2), [51, 255] * 4000)
    for part in ("train", "t10k"):
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(content)
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(encoded((4000,), [0] * 4000))
    found = load_idx_binary(tmp_path, binarize="stochastic", seed=1)
    assert bool((found.train[:, 1] == 1).all()) and abs(float(found.train[:, 0].mean()) - 0.2) < 5 * 0.4 / 4000**0.5
    assert not torch.equal(found.train, found.test), "training and test images have draws of their own"
    assert torch.equal(found.train, load_idx_binary(tmp_path, binarize="stochastic", seed=1).train)


def rewrite(name, content):
    return lambda folder: (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(), "and no t10k-labels-idx1-ubyte"),
        (rewrite("train-labels-idx1-ubyte", encoded((5,), [1] * 5)), "6 train images and 5 labels"),
        (rewrite("train-images-idx3-ubyte", encoded((6, 6), [1] * 36)), r"uint8 of shape \(6, 6\)"),
        (rewrite("train-labels-idx1-ubyte", encoded((6,), [1] * 6, 0x0C)), r"int32 of shape \(6,\)"),
        (
            rewrite("t10k-images-idx3-ubyte", encoded((4, 2, 2), [1] * 16)),
            r"\(3, 2\) pixels and test images of \(2, 2\)",
        ),
        (rewrite("t10k-images-idx3-ubyte", encoded((0, 3, 2), [])), r"shape \(0, 3, 2\)"),
        (rewrite("t10k-images-idx3-ubyte", b"<html>not found</html>"), "3c 68 74 6d"),
    ],
)
def test_refuses_a_folder_that_does_not_fit(tmp_path, change, says):
    mnist_like(tmp_path)
    change(tmp_path)
    with pytest.raises(DataError, match=says):
        load_idx_binary(tmp_path)


def test_refuses_what_it_is_asked(tmp_path):
    with pytest.raises(DataError, match="no such folder"):
        load_idx_binary(tmp_path / "none")
    mnist_like(tmp_path)
    for number in (0, 7):
        with pytest.raises(DataError, match=f"num_train={number}"):
            load_idx_binary(tmp_path, number)
    for load in (
        lambda: load_idx_binary(tmp_path, binarize="treshold"),
        lambda: load_digits_binary(binarize="treshold"),
    ):
        with pytest.raises(EmvaeError, match="Did you mean 'threshold'"):
            load()
