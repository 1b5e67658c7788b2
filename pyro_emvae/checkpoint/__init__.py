r"""Checkpoints: all that a run changes in one file, written whole or not at all, that executes nothing when read.

A run that was killed goes on from its file with the very numbers that it would have had. For that the file has the
`State`, every generator, the history, and where the run stood.
"""

from .content import load, pack, restore, restore_waiting, save
from .file import FORMAT, read, write
from .plain import decoded, plain
from .run import Checkpoints, Position

__all__ = [
    "FORMAT",
    "Checkpoints",
    "Position",
    "decoded",
    "load",
    "pack",
    "plain",
    "read",
    "restore",
    "restore_waiting",
    "save",
    "write",
]
