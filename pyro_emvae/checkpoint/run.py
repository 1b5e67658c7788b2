r"""The file of a run: where it starts, and when it is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..engine import Engine
from ..particles import quiet
from .content import check_history, device_of, pack, restore, restore_history
from .generators import kind_of_data, loader_state, restore_loader
from .plain import plain, refuse
from .store import store_of

__all__ = ["Checkpoints", "Position"]

GOES_ON = ("", "MAX_ITER", "INTERRUPTED", "NAN")


@dataclass(frozen=True)
class Position:
    """Where a run starts: iterations and epochs made, how it had ended, what it had left out, whence it was read."""

    iteration: int = 0
    epoch: int = 0
    status: str = ""
    skipped: int = 0
    source: str = ""

    @property
    def ended(self) -> bool:
        """Whether a stopping rule had ended the run, so that it does not go on."""
        return self.status not in GOES_ON


class Checkpoints:
    r"""The file of one run: read before it, written between iterations, with a loader between epochs.

    Args:
        engine: What the run changes.
        path: The file, in a folder that exists, or another `Store`; None: nothing is read or written.
        resume: ``"auto"``: go on if the file exists, else start; True: the file has to exist; False: start anew, the
            first checkpoint replaces the file.
        data: The loader, whose generators belong to the run.
        seed: The run's seed; that of the file has to be the same.

    One run writes one file. A process that is killed while it writes leaves ``.<name>.tmp`` beside it, which the next
    checkpoint overwrites.

    Raises:
        CheckpointError: The path cannot be written, the file is missing, damaged, of another format or another model.

    Example:
        >>> import tempfile, pyro
        >>> from pathlib import Path
        >>> from pyro_emvae import SVI, problems
        >>> pyro.clear_param_store()
        >>> model, guide, (x,) = (p := problems.linear_gaussian()).model, p.guide, p.args
        >>> path = Path(tempfile.mkdtemp()) / "run.pt"
        >>> for number in (10, 30):
        ...     svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}))
        ...     fit = svi.run(number, x, checkpoint=path, seed=0)
        ...     print(fit.num_iterations, fit.provenance.get("resumed_from", "")[:15])
        10
        30 iteration 10 of
    """

    def __init__(
        self, engine: Engine, path: Any, resume: Any = "auto", data: Any = None, seed: int | None = None
    ) -> None:
        if resume is not True and resume is not False and resume != "auto":
            refuse("resume", repr(resume), "there are three ways to start", 'Write resume="auto", True or False.')
        if path is None and resume is True:
            refuse("resume", "no path", "a run goes on from a file", "Write checkpoint=path.")
        self.engine, self.resume, self.data, self.seed = engine, resume, data, seed
        self.path = store_of(path)
        self.skipped = engine.skipped

    def begin(self, history: Any, first: Callable[[], tuple[tuple, Mapping[str, Any]]]) -> Position:
        """Go on from the file, if there is one and it is wanted.

        Args:
            history: Gets what the file's run had recorded.
            first: Returns the arguments of a batch, by which a new process finds its parameters.
        """
        if self.path is None or self.resume is False or (self.resume == "auto" and not self.path.exists()):
            return Position()
        content = self.path.read()
        if self.seed is not None and content["seed"] not in (None, self.seed):
            refuse(
                f"go on from {self.path}",
                f"seed={self.seed}",
                f"its run has seed {content['seed']}",
                f"Write seed={content['seed']}, another path, or resume=False.",
            )
        if content["iteration"]:
            self._check_loader(content["rng"].get("loader"))
        check_history(history, content)
        engine = self.engine
        engine.refresh()
        restore(engine, content, *(((), {}) if engine.parameters is not None else self._peek(first)))
        restore_loader(self.data, content["rng"].get("loader"))
        restore_history(history, content, device_of(engine.parameters))
        self.skipped = content["skipped"]
        self.seed = content["seed"]
        source = f"iteration {content['iteration']} of {self.path}"
        return Position(content["iteration"], content["epoch"], content["status"], self.skipped, source)

    def _check_loader(self, saved: Any) -> None:
        here, there = kind_of_data(loader_state(self.data)), kind_of_data(saved)
        if here != there:
            refuse(
                f"go on from {self.path}",
                f"{here}, {there} in the file",
                "the order of the data belongs to the run",
                "Give the data as before, such as DataLoader(..., generator=...).",
            )

    def _peek(self, first: Callable[[], tuple[tuple, Mapping[str, Any]]]) -> tuple[tuple, Mapping[str, Any]]:
        if isinstance(self.data, Iterator):
            refuse(
                f"go on from {self.path}",
                f"an iterator of type {type(self.data).__name__}",
                "a new process finds its parameters by a first batch, and an iterator would lose it",
                "Pass a list or a DataLoader, or take a step first.",
            )
        before = loader_state(self.data)
        with quiet():
            batch = first()
        restore_loader(self.data, before)
        return batch

    def write(self, history: Any, iteration: int, epoch: int, status: str = "") -> None:
        """Write the file, if there is to be one."""
        if self.path is None:
            return
        content = pack(self.engine, history, iteration=iteration, epoch=epoch, status=status, seed=self.seed)
        content["skipped"] = self.skipped
        loader = loader_state(self.data)
        content["rng"]["loader"] = None if loader is None else plain(loader, "the loader's state")
        self.path.write(content)
