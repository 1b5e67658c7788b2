r"""The file: there whole or not at all, every checksum compared, nothing executed."""

from __future__ import annotations

import contextlib
import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .plain import refuse

__all__ = ["FORMAT", "read", "writable", "write"]

FORMAT = 1
KEYS = ("versions", "fingerprint", "state", "rng", "history", "iteration", "epoch", "status", "seed", "skipped")


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file that is there whole or not at all: a temporary one beside it, fsync, rename, fsync of the folder."""
    waiting = path.with_name(f".{path.name}.tmp")
    try:
        with open(waiting, "wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(waiting, path)
    except BaseException as cause:
        with contextlib.suppress(OSError):
            waiting.unlink()
        if isinstance(cause, OSError | RuntimeError):
            refuse(f"be written to {path}", f"{cause}", "the file system refused it", "Choose another path.", cause)
        raise
    with contextlib.suppress(OSError):  # a folder cannot be opened on every system
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def read(path: Any) -> dict[str, Any]:
    r"""Read a file without executing anything; every byte of its values is checked.

    Raises:
        CheckpointError: There is no such file, it is damaged, holds other than plain values, or has another format.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except OSError as cause:
        refuse(f"be read from {path}", f"{cause}", "it has to be a file", "Give the path of a checkpoint.", cause)
    try:
        damaged = zipfile.ZipFile(io.BytesIO(data)).testzip()
        content = None if damaged else torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as cause:
        refuse(
            f"be read from {path}",
            f"{len(data)} bytes that are no checkpoint ({type(cause).__name__}: {str(cause)[:200]})",
            "the file is damaged, or it was not written by save or run",
            "Give a whole checkpoint, or write resume=False to start anew.",
            cause,
        )
    if damaged:
        refuse(
            f"be read from {path}",
            f"a wrong checksum of its part {damaged!r}",
            "the file is damaged",
            "Give a whole checkpoint, or write resume=False to start anew.",
        )
    number = content.get("format") if isinstance(content, dict) else None
    if number != FORMAT or not set(KEYS) <= content.keys():
        refuse(
            f"be read from {path}",
            f"format {number!r}",
            f"this version reads format {FORMAT}",
            "Read it with the version that wrote it, or write resume=False to start anew.",
        )
    return content


def writable(path: Any) -> Path:
    """Return the path if a file can be there, so that a run does not fail at its first checkpoint."""
    try:
        path = Path(os.fspath(path)).absolute()
    except TypeError as cause:
        refuse("be written", f"{path!r}", "a path is a string or a pathlib.Path", "Write checkpoint='run.pt'.", cause)
    if path.is_dir() or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        got = "a folder" if path.is_dir() else f"the folder {path.parent}, which is missing or not writable"
        refuse(f"be written to {path}", got, "it is a file in a folder that exists", "Make the folder first.")
    return path
