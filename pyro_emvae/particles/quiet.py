r"""Code that only looks: generators forked, buffers and modes restored."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import torch
from torch import Tensor, fx, nn

__all__ = ["ModuleWatch", "generators", "keep_buffers", "quiet"]


@contextlib.contextmanager
def quiet(*, seed: int | None = None, train: bool | None = None, validate: bool | None = None) -> Iterator[ModuleWatch]:
    r"""Run code that only measures: generators, buffers, modes and validation are as before when it ends.

    Args:
        seed: Seed of the forked torch, numpy and Python generators; None goes on from their present state.
        train: Mode of every module that is called meanwhile: True, False, or None for its own.
        validate: Pyro's validation meanwhile, or None for its own.

    Modules are found by a forward hook, so that buffers of networks that no one registered are restored too.
    """
    states = (random.getstate(), np.random.get_state())
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    validation = pyro.validation_enabled(validate) if validate is not None else contextlib.nullcontext()
    with ModuleWatch(train) as watch:
        try:
            with torch.random.fork_rng(devices), validation:
                if seed is not None:
                    torch.manual_seed(seed)
                    random.seed(seed)
                    np.random.seed(seed % 2**32)
                yield watch
        finally:
            watch.restore()
            random.setstate(states[0])
            np.random.set_state(states[1])


@contextlib.contextmanager
def keep_buffers() -> Iterator[None]:
    """Run code that draws, as an E-step does, but moves no buffer of any module that it calls."""
    with ModuleWatch() as watch:
        try:
            yield
        finally:
            watch.restore()


def generators() -> Callable[[], None]:
    """Return a function that takes torch's, numpy's and Python's generators back to where they are now."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()

    def rewind() -> None:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

    return rewind


class ModuleWatch:
    """Note every module that is called, with its mode and copies of its buffers as they were before."""

    def __init__(self, train: bool | None = None) -> None:
        self.train = train
        self.saved: dict[nn.Module, tuple[bool, dict[str, tuple[Tensor, Tensor]]]] = {}

    def __enter__(self) -> ModuleWatch:
        self.handle = nn.modules.module.register_module_forward_pre_hook(self._note)
        return self

    def __exit__(self, *_: Any) -> None:
        self.handle.remove()

    def _note(self, module: nn.Module, _: Any) -> None:
        if module not in self.saved and not isinstance(module, fx.GraphModule):
            buffers = {n: (b, b.clone()) for n, b in module._buffers.items() if b is not None}
            self.saved[module] = (module.training, buffers)
            if self.train is not None:
                module.training = self.train

    def replaced(self) -> str | None:
        """Return the first buffer that was exchanged for another tensor, where others are written in place."""
        for module, (_, buffers) in self.saved.items():
            for name, (tensor, _) in buffers.items():
                if module._buffers.get(name) is not tensor:
                    return f"{type(module).__name__}.{name}"
        return None

    def restore_modes(self) -> None:
        """Put modes back."""
        if self.train is not None:
            for module, (training, _) in self.saved.items():
                module.training = training

    def restore(self) -> None:
        """Put modes and buffers back: the same tensors with the same values."""
        self.restore_modes()
        with torch.no_grad():
            for module, (_, buffers) in self.saved.items():
                for name, (tensor, value) in buffers.items():
                    module._buffers[name] = tensor
                    if not torch.equal(tensor, value):
                        tensor.copy_(value)
