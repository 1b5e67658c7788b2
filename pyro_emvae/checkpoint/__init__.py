r"""Checkpoints: all that a run changes in one file, written whole or not at all, that executes nothing when read.

A run that was killed goes on from its file with the very numbers that it would have had. For that the file has the
`State`, every generator, the history, and where the run stood.
"""

from .content import load, pack, restore, restore_waiting, save
from .file import FORMAT, read, writable, write
from .generators import loader_state, restore_loader
from .plain import decoded, plain, refuse
from .run import Checkpoints, Position
from .store import File, Store, store_of

__all__ = [
    "FORMAT",
    "Checkpoints",
    "File",
    "Position",
    "Store",
    "decoded",
    "load",
    "loader_state",
    "pack",
    "plain",
    "read",
    "refuse",
    "restore",
    "restore_loader",
    "restore_waiting",
    "save",
    "store_of",
    "writable",
    "write",
]
