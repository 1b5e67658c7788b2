r"""Latents that are masked while something that depends on them is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from .._checks import StepError, fail

__all__ = ["counted_without", "refuse_counted"]


def counted_without(reached: Mapping[str, Iterable[str]], masks: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield latents and sites: the site depends on the latent, and counts at elements at which the latent does not.

    Args:
        reached: The latents that each site depends on.
        masks: Of every site: a tensor over the plates, a number, or None.
    """
    for name, latents in reached.items():
        kept = masks[name]
        for latent in latents:
            mask = masks[latent]
            if latent == name or mask is None or mask is kept:
                continue
            mask = torch.as_tensor(mask)
            if bool((~mask if kept is None else torch.as_tensor(kept, device=mask.device) & ~mask).any()):
                yield latent, name


def refuse_counted(obj: str, pairs: Iterable[tuple[str, str]]) -> None:
    """Raise for the first such pair: leaving a latent's density out alone would be wrong."""
    for latent, site in pairs:
        fail(
            StepError,
            obj,
            f"leave out latent {latent!r} where it is masked",
            got=f"site {site!r}, which depends on it and is not masked there",
            because="a latent that something observed depends on is part of the model",
            fix="Put poutine.mask around the observation alone, or around all that depends on the latent.",
        )
