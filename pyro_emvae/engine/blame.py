r"""Whose line it was: the statement of the model or guide because of which two recordings differ."""

from __future__ import annotations

import os
import random
import traceback
from collections.abc import Callable

import numpy as np
import pyro
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .._checks import RecordingError, fail
from ..parameters import sample_statements
from ..particles import quiet
from .gradients import descent

__all__ = ["line_of", "refuse", "shift_generators"]

HERE = os.path.dirname(os.path.dirname(__file__)) + os.sep


PACKAGES = (HERE, *(os.path.dirname(m.__file__) + os.sep for m in (torch, pyro, np)))
EXAMPLES = os.path.join(HERE, "problems")
WORKERS = tuple(os.path.join(HERE, name) for name in ("loss.py", "objectives.py", "particles"))


def _is_user(frame: traceback.FrameSummary) -> bool:
    name = frame.filename
    if name.startswith(EXAMPLES):
        return True
    return not (name.startswith(PACKAGES) or name.startswith(os.path.dirname(os.__file__)) or name.startswith("<"))


def _line(frames: traceback.StackSummary) -> str:
    """Return the innermost line of model or guide; none if the package itself was at work when it happened."""
    for frame in reversed(frames):
        if _is_user(frame):
            return f"{os.path.basename(frame.filename)}:{frame.lineno}: {frame.line}"
        if frame.filename.startswith(WORKERS) or (frame.name == descent.__name__ and frame.filename.startswith(HERE)):
            break
    return ""


def line_of(error: BaseException) -> str:
    line = _line(traceback.extract_tb(error.__traceback__))
    return f" at {line}" if line else ""


def shift_generators() -> None:
    """Move torch's, numpy's and Python's generators on, and the normal that each keeps, so that all draws differ."""
    for draw in (torch.rand, torch.randn, np.random.random, np.random.standard_normal):
        draw(1)
    random.random()
    random.gauss(0.0, 1.0)


class _Diary(TorchDispatchMode):
    """Write down every operation, its numbers and constants, and the user's line that caused it."""

    def __init__(self, known: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.entries: list[tuple[str, str]] = []
        self.made = list(known)
        self.ids = {id(t) for t in known}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = pytree.tree_leaves((args, kwargs or {}))
        numbers = [x for x in leaves if isinstance(x, int | float | bool)]
        for constant in (x for x in leaves if isinstance(x, Tensor) and id(x) not in self.ids):
            numbers += constant.flatten()[:8].tolist()
        self.entries.append((f"{func} {numbers}", _line(traceback.extract_stack()[:-1])))
        out = func(*args, **(kwargs or {}))
        new = [x for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        self.made += new
        self.ids.update(map(id, new))
        return out


def refuse(step: Callable, inputs: tuple, difference: str) -> None:
    diaries, statements = [], []
    for shift in (False, True):
        with quiet(validate=False):
            if shift:
                shift_generators()
            with _Diary(inputs) as diary:
                stacks = sample_statements(lambda: step(*inputs))
        diaries.append(diary.entries)
        statements.append([(key, _line(stack)) for key, stack in stacks])
    pairs = [*zip(*statements, strict=False), *zip(*diaries, strict=False)]
    lines = next(([a[1], b[1]] for a, b in pairs if a[0] != b[0]), [])
    where = "".join(f" at {line}" for line in dict.fromkeys(lines) if line)
    fail(
        RecordingError,
        'backend="graph"',
        "record the step as a graph",
        got=difference + where,
        because="a number that Python changes from call to call would be frozen "
        "(a counter, numpy or Python randomness, an annealing attribute)",
        fix='Pass it as a tensor argument, draw it with torch, or write backend="eager".',
    )
