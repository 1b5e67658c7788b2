r"""The generators of a run: torch's, Python's, numpy's, and those of its loader."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from .plain import decoded

__all__ = ["generators", "kind_of_data", "loader_state", "restore_generators", "restore_loader"]


def generators() -> dict[str, Any]:
    """Return the states of torch's, Python's and numpy's generators."""
    numpy = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (numpy[0], torch.from_numpy(numpy[1].astype(np.int64)), *numpy[2:]),
    }


def restore_generators(saved: Mapping[str, Any]) -> None:
    torch.set_rng_state(saved["torch"])
    if saved["cuda"] and torch.cuda.is_available() and len(saved["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(saved["cuda"])
    random.setstate(saved["python"])
    name, keys, *rest = saved["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


def _loader_generators(data: Any) -> list[torch.Generator]:
    """Return the generators that a DataLoader and its samplers were given, each once."""
    batches = getattr(data, "batch_sampler", None)
    owners = (data, getattr(data, "sampler", None), batches, getattr(batches, "sampler", None))
    found = [getattr(owner, "generator", None) for owner in owners]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())


def _has_state(data: Any) -> bool:
    return callable(getattr(data, "state_dict", None)) and callable(getattr(data, "load_state_dict", None))


def loader_state(data: Any) -> Any:
    if data is None:
        return None
    return data.state_dict() if _has_state(data) else [g.get_state() for g in _loader_generators(data)]


def kind_of_data(state: Any) -> str:
    if state is None:
        return "arguments"
    return f"a loader with {len(state)} generators of its own" if isinstance(state, list) else "a loader with a state"


def restore_loader(data: Any, saved: Any) -> None:
    if data is None or saved is None:
        return
    saved = decoded(saved)
    if _has_state(data):
        data.load_state_dict(saved)
        return
    for generator, state in zip(_loader_generators(data), saved, strict=False):
        generator.set_state(state)
