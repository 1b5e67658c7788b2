r"""Values that a file can hold: tensors on the CPU, numbers, strings, lists, tuples and dicts; and back."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from .._checks import CheckpointError, fail

__all__ = ["decoded", "plain", "refuse"]

SCALARS = (bool, int, float, complex, str, type(None))
ELSEWHERE, ARRAY, ARRAYS, ROWS, NUMBERS = "__elsewhere__", "__array__", "__arrays__", "__rows__", "__numbers__"


def plain(x: Any, where: str) -> Any:
    r"""Return `x` as tensors on the CPU, numbers, strings, lists, tuples and dicts; `decoded` is the inverse.

    Arrays, long lists of numbers and lists of rows of numbers become tensors; a tensor elsewhere is marked.

    Raises:
        CheckpointError: Something else, with its place.

    Example:
        >>> plain({"rows": [(0, 1.5), (1, 2.5)]}, "the history")
        {'rows': {'__rows__': [tensor([0, 1]), tensor([1.5000, 2.5000], dtype=torch.float64)]}}
    """
    kind = type(x)
    if kind in SCALARS or isinstance(x, torch.Size | Counter):
        return x
    if isinstance(x, Tensor):
        copied = x.detach().to("cpu", copy=True)
        return copied if x.device.type == "cpu" else {ELSEWHERE: copied}
    if isinstance(x, np.generic):
        return x.item()
    if isinstance(x, np.ndarray) and x.dtype.kind in "biufc":
        return {ARRAY: torch.from_numpy(x.copy())}
    if kind is list:
        packed = _packed_list(x)
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(x)] if packed is None else packed
    if kind is tuple:
        return tuple(plain(v, f"{where}[{i}]") for i, v in enumerate(x))
    if kind in (dict, OrderedDict) and all(type(k) in SCALARS for k in x):
        return kind((k, plain(v, f"{where}[{k!r}]")) for k, v in x.items())
    refuse(
        f"hold {where}",
        f"{x!r:.80} of type {kind.__name__}",
        "a file that executes nothing when it is read holds tensors, numbers, strings, lists, tuples and dicts",
        "Keep it as one of these.",
    )


def _packed_list(x: list) -> dict[str, Any] | None:
    """Return a list of arrays, of numbers or of rows of numbers as few tensors; None if it is another list."""
    if not x:
        return None
    if isinstance(x[0], np.ndarray):
        alike = all(isinstance(a, np.ndarray) and (a.dtype, a.shape) == (x[0].dtype, x[0].shape) for a in x)
        return {ARRAYS: torch.from_numpy(np.stack(x))} if alike and x[0].dtype.kind in "biufc" else None
    if set(map(type, x)) == {tuple} and x[0] and set(map(len, x)) == {len(x[0])}:
        columns = [_column(column) for column in zip(*x, strict=True)]
        return None if any(c is None for c in columns) else {ROWS: columns}
    column = _column(x)
    return None if column is None else {NUMBERS: column}


def _column(x: Sequence) -> Tensor | None:
    """Return numbers of one type as a tensor that gives them back bit for bit; None if they are not of one."""
    dtype = {(float,): np.float64, (int,): np.int64}.get(tuple(set(map(type, x))))
    try:
        return None if dtype is None else torch.from_numpy(np.array(x, dtype=dtype))
    except OverflowError:
        return None


def decoded(x: Any, device: torch.device | None = None) -> Any:
    """Return what `plain` was given; tensors that were not on the CPU go to `device`."""
    if isinstance(x, dict):
        if len(x) == 1 and (tag := next(iter(x))) in DECODERS:
            return DECODERS[tag](x[tag], device)
        return type(x)((k, decoded(v, device)) for k, v in x.items()) if not isinstance(x, Counter) else x
    if type(x) in (list, tuple):
        return type(x)(decoded(v, device) for v in x)
    return x


DECODERS: dict[str, Callable[[Any, Any], Any]] = {
    ELSEWHERE: lambda x, device: x.to(device),
    ARRAY: lambda x, device: x.numpy().copy(),
    ARRAYS: lambda x, device: [np.array(a) for a in x.numpy()],
    ROWS: lambda x, device: list(zip(*(c.tolist() for c in x), strict=True)),
    NUMBERS: lambda x, device: x.tolist(),
}


def refuse(act: str, got: str, because: str, fix: str, cause: BaseException | None = None) -> NoReturn:
    fail(CheckpointError, "checkpoint", act, got=got, because=because, fix=fix, cause=cause)
