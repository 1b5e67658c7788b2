r"""Estimators side by side on one model: bias, variance, cost."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from statistics import NormalDist, median
from typing import Any

import torch
from pyro.infer import ELBO, JitTrace_ELBO, Trace_ELBO, TraceEnum_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from torch import Tensor

from ._checks import EmvaeError, EstimatorError, RecordingError, fail, nearest, positive_int
from .engine import Replicator, gradient, record
from .estimators.base import Estimator, is_point_mass
from .loss import MonteCarloELBO
from .parameters import GUIDE, MODEL, Parameters, discover, keep_store
from .particles import draw, hold_batch, quiet

__all__ = ["GradientComparison", "compare_gradients"]

BURN_IN = 50
METRICS = {
    "bias": "norm of the mean difference to the reference over the coordinates",
    "bias_z": "largest |z| of a coordinate's mean difference to the reference",
    "variance_mean": "variance of the gradient, mean over coordinates",
    "variance_max": "variance of the gradient, largest coordinate",
    "snr": "|mean| / standard deviation, mean over coordinates",
}


@dataclass(frozen=True)
class GradientComparison:
    r"""What `compare_gradients` measured; prints as a table.

    Args:
        dataset: An `xarray.Dataset` over ``estimator`` and ``block``.
        looped: Rows whose replicates could not be vectorized, with the reason.
    """

    dataset: Any = field(repr=False)
    looped: dict[str, str] = field(repr=False)

    def __str__(self) -> str:
        data = self.dataset
        header = ["estimator", "block", *METRICS, "ms", "evals", "var x evals", "var x ms"]
        rows = []
        for name in data.estimator.values:
            for block in data.block.values:
                cell = data.sel(estimator=name, block=block)
                names = [*METRICS, "milliseconds", "evaluations", "variance_evaluations", "variance_time"]
                label = f"{name} (biased)" if name in data.attrs["biased"] else str(name)
                rows.append([label, str(block), *[f"{float(cell[n]):.3g}" for n in names]])
        widths = [max(len(r[i]) for r in [header, *rows]) for i in range(len(header))]
        lines = ["  ".join(x.ljust(w) for x, w in zip(r, widths, strict=True)).rstrip() for r in [header, *rows]]
        limit, reference = data.attrs["bias_z_limit"], data.attrs["reference"]
        lines.append(
            f"bias against {reference}; |z| beyond {limit:.1f} is beyond chance; "
            f"{data.attrs['num_replicates']} replicates"
        )
        if float(data.snr.min()) < data.attrs["snr_floor"]:
            lines.append(f"an snr below {data.attrs['snr_floor']:.2g} cannot be told from 0 with so many replicates")
        lines += [f"{name} was run one replicate at a time: {why}" for name, why in self.looped.items()]
        return "\n".join(lines)

    __repr__ = __str__

    def to_csv(self, path: Any) -> None:
        """Write one line per estimator and block."""
        self.dataset.to_dataframe().reset_index().to_csv(path, index=False)

    def plot(self, block: str | None = None, ax: Any = None) -> Any:
        """Draw the variance ladder; see `plots.plot_variance_ladder`."""
        from .plots import plot_variance_ladder

        return plot_variance_ladder(self.dataset, block=block, ax=ax)


@dataclass
class _Row:
    """One estimator: its loss, how often it runs the model, and its gradients by block: (replicates, coordinates)."""

    name: str
    loss: Any
    unbiased: bool = False
    biased: bool = False
    samples: dict[str, Tensor] = field(default_factory=dict)
    milliseconds: float = math.nan
    looped: str = ""

    @property
    def evaluations(self) -> int:
        return self.loss.num_particles

    @functools.cached_property
    def variances(self) -> dict[str, Tensor]:
        return {block: samples.double().var(0) for block, samples in self.samples.items()}


def compare_gradients(
    model: Callable,
    guide: Callable,
    *args: Any,
    estimators: Iterable[Any] | Mapping[str, Any] | None = None,
    num_replicates: int = 1000,
    num_particles: int = 2,
    reference: Mapping[str, Tensor] | None = None,
    objective: Any = "elbo",
    blocks: Any = None,
    max_coordinates: int = 20_000,
    memory: float | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> GradientComparison:
    r"""Estimate the same gradient with several estimators and compare bias, variance and cost.

    The gradient is that of the objective (maximised) by the unconstrained parameters, at their present values.

    Args:
        model, guide, args, kwargs: The problem.
        estimators: Rows: registered names, instances, mappings from site to these, or any `pyro.infer.ELBO`, run
            through its own ``loss_and_grads``; or a mapping from label to row. By default ``"score"``,
            ``"leave_one_out"`` (if K > 1), ``"pathwise"`` if every site allows it, and `Trace_ELBO`. A row wins over
            the guide's annotations.
        num_replicates: R, independent replicates of each row. They are vectorized over the recorded gradient; a row
            that cannot be (a Pyro loss, a sampler without a batching rule) is looped and named.
        num_particles: K of the default rows and of those that are no instances of a loss.
        reference: Exact gradient by parameter name. By default bias is the paired difference to the unbiased row of
            least variance, whose own bias is then not measured (NaN).
        objective: Objective of the rows.
        blocks: See `EM`.
        max_coordinates: Per block at most so many coordinates, drawn at random, are kept.
        memory: Bytes that one chunk of replicates may take; by default 15 million, which stay in a processor's cache,
            or a quarter of a GPU's free memory.
        seed: Seed of the forked generators.

    Returns:
        Per row and block: bias (norm of the mean difference), its z (the largest over coordinates; `bias_z_limit` is
        its 0.1 % point under no bias), variance (mean and largest over coordinates), signal-to-noise ratio,
        milliseconds of one ordinary eager gradient, model evaluations, variance x evaluations and x milliseconds.
        Rows of biased estimators are marked, and named in ``dataset.attrs["biased"]``.
        Without a reference (which is of the full data), one batch of a plate that subsamples is held, and a row
        ``minibatch`` says how much variance comes from the choice of the batch, which no estimator can remove.

    Parameters, buffers, ``.grad`` and generators are bit-for-bit as before.

    Source: Mohamed et al. 2020, section 8, for the design; Rainforth et al. 2018 for the signal-to-noise ratio.

    Example:
        >>> import pyro
        >>> from pyro_emvae import problems
        >>> pyro.clear_param_store()
        >>> problem = problems.two_level()
        >>> table = compare_gradients(
        ...     problem.model, problem.guide, *problem.args, estimators=["score", "pathwise"], seed=0)
        >>> variance = table.dataset.variance_mean.sel(block="guide")
        >>> bool(variance.sel(estimator="score") > 5 * variance.sel(estimator="pathwise"))
        True
    """
    positive_int("compare_gradients", "num_replicates", num_replicates, 2)
    positive_int("compare_gradients", "num_particles", num_particles)
    with quiet(seed=seed):
        parameters = discover(model, guide, args, kwargs, blocks=blocks)
    if not parameters.leaves():
        fail(
            EmvaeError,
            "compare_gradients",
            "compare gradients",
            got="a model and a guide without parameters",
            because="a gradient needs something to differentiate by",
            fix="Declare parameters with pyro.param.",
        )
    with quiet(seed=seed), keep_store():
        specs = _specs(model, guide, args, kwargs, estimators, num_particles)
        rows = [_row(*spec, num_particles, objective) for spec in specs]
        batch = _batch(model, guide, args, kwargs) if reference is None else {}
        keep = _coordinates(parameters, max_coordinates)
        base = int(torch.randint(2**31, ()))
        with hold_batch(batch):
            for row in rows:
                _warm_up(row, model, guide, args, kwargs)
                row.unbiased = _is_unbiased(row, model, guide, args, kwargs)
                row.biased = isinstance(row.loss, MonteCarloELBO) and not row.unbiased
                _sample(row, model, guide, args, kwargs, parameters, keep, num_replicates, memory, base)
            _time(rows, model, guide, args, kwargs)
        minibatch = None
        if batch:
            best = _least_variance(rows, keep) or rows[0]
            minibatch = _minibatch(best, model, guide, args, kwargs, parameters, keep, num_replicates, memory)
    return _assemble(rows, keep, parameters, reference, minibatch, num_replicates)


# Rows -----------------------------------------------------------------------------------------------------------


def _specs(model, guide, args, kwargs, estimators, num_particles) -> list[tuple[str, Any]]:
    if estimators is None:
        with torch.no_grad():
            sites = draw(model, guide, args, kwargs).guide.values()
        pathwise = ["pathwise"] if all(s.fn.has_rsample for s in sites if not s.is_observed) else []
        several = ["leave_one_out"] if num_particles > 1 else []
        estimators = ["score", *several, *pathwise, Trace_ELBO(num_particles=num_particles)]
    if isinstance(estimators, str | Estimator | ELBO):
        estimators = [estimators]
    if not estimators:
        fail(
            EmvaeError,
            "compare_gradients",
            "compare gradients",
            got=f"estimators={estimators!r}",
            because="there has to be a row",
            fix='Write estimators=["score", "pathwise", Trace_ELBO()].',
        )
    if isinstance(estimators, Mapping):
        return list(estimators.items())
    specs: dict[str, Any] = {}
    for spec in estimators:
        name = _label(spec)
        count = sum(n == name or n.startswith(f"{name} (") for n in specs)
        specs[name if not count else f"{name} ({count + 1})"] = spec
    return list(specs.items())


def _label(spec: Any) -> str:
    if isinstance(spec, str):
        return spec
    if isinstance(spec, Mapping):
        return ", ".join(f"{site}: {_label(part)}" for site, part in spec.items())
    return type(spec).__name__ if isinstance(spec, ELBO) else repr(spec)


def _row(name: str, spec: Any, num_particles: int, objective: Any) -> _Row:
    if isinstance(spec, ELBO):
        if not isinstance(spec, MonteCarloELBO):
            return _Row(name, _twin(spec))
        own = spec.fresh()
        own.state = dict(spec.state)
        return _Row(name, own)
    if not isinstance(spec, str | Estimator | Mapping) and not callable(spec):
        fail(
            EstimatorError,
            "compare_gradients",
            f"use row {name!r}",
            got=type(spec).__name__,
            because="a row is a name, an estimator, a mapping or a pyro.infer.ELBO",
            fix='Write estimators=["score", "pathwise", Trace_ELBO()].',
        )
    annotations = isinstance(spec, Mapping)
    return _Row(
        name,
        MonteCarloELBO(num_particles, estimator=spec, objective=objective, annotations=annotations),
    )


def _twin(loss: ELBO) -> ELBO:
    """Return a shallow copy; `copy.copy` would leave a mark on Pyro's class (``__slotnames__``)."""
    twin = object.__new__(type(loss))
    twin.__dict__.update(loss.__dict__)
    return twin


def _is_unbiased(row: _Row, model, guide, args, kwargs) -> bool:
    """Whether the row's mean is the gradient of the ELBO, as far as traits and Pyro's documentation say so.

    `Trace_ELBO` leaves auxiliary sites of the guide out of the score function's signal.
    """
    if isinstance(row.loss, MonteCarloELBO):
        return all(resolution.estimator.traits.unbiased for resolution in row.loss.table)
    if isinstance(row.loss, TraceGraph_ELBO | TraceMeanField_ELBO | TraceEnum_ELBO):
        return True
    with torch.no_grad():
        sites = draw(model, guide, args, kwargs).guide.values()
    auxiliary = any(s.infer.get("is_auxiliary") and not is_point_mass(s.fn) for s in sites)
    return type(row.loss) in (Trace_ELBO, JitTrace_ELBO) and not auxiliary


def _batch(model, guide, args, kwargs) -> dict[str, Tensor]:
    """Draw the indices of the plates that subsample, to be held."""
    with torch.no_grad():
        return draw(model, guide, args, kwargs).subsample


def _coordinates(parameters: Parameters, limit: int) -> dict[str, dict[str, Tensor | None]]:
    """Choose which coordinates of each parameter are kept: None for all."""
    keep: dict[str, dict[str, Tensor | None]] = {}
    for block in (GUIDE, MODEL, "shared"):
        leaves = parameters.leaves(block)
        total = sum(leaf.numel() for leaf in leaves.values())
        if not total:
            continue
        share = min(1.0, limit / total)
        keep[block] = {
            n: None if share == 1.0 else torch.randperm(p.numel())[: max(1, int(share * p.numel()))]
            for n, p in leaves.items()
        }
    return keep


def _pick(grads: Mapping[str, Tensor], leaves: Mapping[str, Tensor], keep: Mapping[str, Any], rows: int) -> Tensor:
    """Flatten the kept coordinates of one block; a parameter without gradient has gradient 0."""
    parts = []
    for name, index in keep.items():
        g = grads.get(name)
        leaf = leaves[name]
        g = leaf.new_zeros(rows, leaf.numel()) if g is None else g.detach().reshape(rows, -1)
        parts.append((g if index is None else g[:, index.to(g.device)]).cpu())
    dtype = functools.reduce(torch.promote_types, (part.dtype for part in parts))
    return torch.cat([part.to(dtype) for part in parts], 1)


# Replicates -----------------------------------------------------------------------------------------------------


def _warm_up(row: _Row, model, guide, args, kwargs) -> None:
    """Check the row on the problem; let a stateful estimator see a few steps, so that it is compared in use."""
    if not isinstance(row.loss, MonteCarloELBO):
        return
    evaluation = row.loss.evaluate(model, guide, args, kwargs)
    row.loss.state = evaluation.state
    for _ in range(BURN_IN if evaluation.state else 0):
        row.loss.state = row.loss.evaluate(model, guide, args, kwargs).state


def _sample(row, model, guide, args, kwargs, parameters, keep, num_replicates, memory, base) -> None:
    leaves = parameters.leaves()
    chunks: dict[str, list[Tensor]] = {block: [] for block in keep}

    def store(grads: Mapping[str, Tensor], rows: int) -> None:
        for block in keep:
            chunks[block].append(-_pick(grads, leaves, keep[block], rows))

    torch.manual_seed(base)
    try:
        _vectorized(row, model, guide, args, kwargs, parameters, num_replicates, memory, store)
    except _CannotVectorize as reason:
        row.looped = str(reason)
        for parts in chunks.values():
            parts.clear()
        torch.manual_seed(base)
        for _ in range(num_replicates):
            store(gradient(model, guide, row.loss, args, kwargs, only=leaves).grads, 1)
    row.samples = {block: torch.cat(parts) for block, parts in chunks.items()}


class _CannotVectorize(Exception):
    pass


def _vectorized(row, model, guide, args, kwargs, parameters, num_replicates, memory, store) -> None:
    if not isinstance(row.loss, MonteCarloELBO):
        raise _CannotVectorize(f"{type(row.loss).__name__} runs its own loss_and_grads")
    try:
        buffers = [b.tensor for b in parameters.buffers]
        recording = record(model, guide, row.loss, parameters.leaves(), buffers, args, kwargs)
    except RecordingError as error:
        raise _CannotVectorize(str(error)) from error
    replicator = Replicator(recording, args, kwargs, row.loss.state)
    for size in _chunks(num_replicates, int((memory or _memory(parameters)) // replicator.bytes_each)):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                grads = replicator(size)
        except (RuntimeError, NotImplementedError) as error:
            raise _CannotVectorize(f"{type(error).__name__}: {str(error).splitlines()[0]}") from error
        store(grads, size)


def _chunks(number: int, limit: int) -> list[int]:
    """Divide a number into parts of at most `limit`, as few and as even as can be."""
    count = math.ceil(number / max(1, limit))
    return [number * (i + 1) // count - number * i // count for i in range(count)]


def _memory(parameters: Parameters) -> float:
    device = next(iter(parameters.leaves().values())).device
    return torch.cuda.mem_get_info(device)[0] / 4 if device.type == "cuda" else 1.5e7


def _time(rows: list[_Row], model, guide, args, kwargs, repeats: int = 4) -> None:
    """Time one ordinary eager gradient of each row, in turn, so that drift hits all alike."""
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    for _ in range(repeats):
        for row in rows:
            start = time.perf_counter()
            gradient(model, guide, row.loss, args, kwargs)
            times[row.name].append(1e3 * (time.perf_counter() - start))
    for row in rows:
        row.milliseconds = median(times[row.name])


def _minibatch(row, model, guide, args, kwargs, parameters, keep, num_replicates, memory) -> dict[str, Tensor]:
    r"""Return $\mathrm{Var}_B\,E[g|B]$ per coordinate: total variance with drawn batches less that within batches.

    Two gradients share each batch, so their covariance over batches is the wanted variance, without bias.
    """
    leaves = parameters.leaves()
    pairs: dict[str, list[Tensor]] = {block: [] for block in keep}
    for _ in range(max(50, num_replicates // 4)):
        with hold_batch(_batch(model, guide, args, kwargs)):
            both = [gradient(model, guide, row.loss, args, kwargs, only=leaves).grads for _ in range(2)]
        for block in keep:
            pairs[block].append(torch.cat([_pick(g, leaves, keep[block], 1) for g in both]))
    result = {}
    for block, parts in pairs.items():
        g = torch.stack(parts).double()
        centred = g - g.mean(0)
        result[block] = ((centred[:, 0] * centred[:, 1]).sum(0) / (len(parts) - 1)).clamp(min=0)
    return result


# Figures --------------------------------------------------------------------------------------------------------


def _least_variance(rows: list[_Row], keep: Mapping[str, Any]) -> _Row | None:
    unbiased = [row for row in rows if row.unbiased]
    return min(unbiased, key=lambda row: sum(float(row.variances[block].sum()) for block in keep), default=None)


def _difference(row: _Row, block: str, reference: Tensor | None, other: _Row | None) -> tuple[float, float]:
    """Return the norm of the mean difference and its largest |z|."""
    samples = row.samples[block].double()
    if reference is not None:
        difference = samples - reference
    elif other is None or other is row:
        return math.nan, math.nan
    else:
        difference = samples - other.samples[block].double()
    mean, error = difference.mean(0), difference.std(0) / math.sqrt(len(difference))
    tiny = torch.finfo(row.samples[block].dtype).eps * samples.abs().mean(0).clamp(min=1e-30) * 10
    z = torch.where(mean.abs() <= tiny, torch.zeros_like(mean), mean.abs() / error.clamp(min=1e-300))
    return float(mean.norm()), float(z.max())


def _assemble(rows, keep, parameters, reference, minibatch, num_replicates) -> GradientComparison:
    import xarray as xr

    exact = _reference(reference, keep, parameters)
    other = None if exact else _least_variance(rows, keep)
    names = [row.name for row in rows] + (["minibatch"] if minibatch else [])
    shape = (len(names), len(keep))
    columns = {name: torch.full(shape, math.nan, dtype=torch.float64) for name in METRICS}
    for j, block in enumerate(keep):
        for i, row in enumerate(rows):
            variance, mean = row.variances[block], row.samples[block].double().mean(0)
            moving = variance > 0
            snr = (mean.abs() / variance.sqrt())[moving].mean() if bool(moving.any()) else torch.tensor(math.inf)
            bias, z = _difference(row, block, exact.get(block) if exact else None, other)
            values = (bias, z, float(variance.mean()), float(variance.max()), float(snr))
            for name, value in zip(METRICS, values, strict=True):
                columns[name][i, j] = value
        if minibatch:
            columns["variance_mean"][-1, j] = float(minibatch[block].mean())
            columns["variance_max"][-1, j] = float(minibatch[block].max())
    tail = [math.nan] if minibatch else []
    ms = torch.tensor([row.milliseconds for row in rows] + tail)
    evaluations = torch.tensor([float(row.evaluations) for row in rows] + tail)
    variance = columns["variance_mean"]
    variables = {n: (("estimator", "block"), c.numpy(), {"meaning": METRICS[n]}) for n, c in columns.items()}
    variables["milliseconds"] = ("estimator", ms.numpy())
    variables["evaluations"] = ("estimator", evaluations.numpy())
    variables["variance_evaluations"] = (("estimator", "block"), (variance * evaluations[:, None]).numpy())
    variables["variance_time"] = (("estimator", "block"), (variance * ms[:, None]).numpy())
    count = sum(row.shape[1] for row in rows[0].samples.values())
    attrs = {
        "num_replicates": num_replicates,
        "reference": "the exact gradient" if exact else f"the row {other.name!r}" if other else "nothing",
        "bias_z_limit": NormalDist().inv_cdf(1 - 0.0005 / max(1, count)),
        "snr_floor": 3 / math.sqrt(num_replicates),
        "coordinates": count,
        "biased": [row.name for row in rows if row.biased],
    }
    looped = {row.name: row.looped for row in rows if row.looped}
    attrs["looped"] = [f"{name}: {why}" for name, why in looped.items()]
    dataset = xr.Dataset(variables, coords={"estimator": names, "block": list(keep)}, attrs=attrs)
    return GradientComparison(dataset, looped)


def _reference(reference, keep, parameters) -> dict[str, Tensor]:
    if reference is None:
        return {}
    leaves = parameters.leaves()
    reference = {name: torch.as_tensor(value) for name, value in reference.items()}
    for name, value in reference.items():
        if name not in leaves or tuple(value.shape) != tuple(leaves[name].shape):
            got = "an unknown parameter" if name not in leaves else f"shape {tuple(value.shape)}"
            fail(
                EmvaeError,
                "compare_gradients",
                f"use the reference of {name!r}",
                got=got,
                because="the exact gradient is by unconstrained parameter",
                fix=nearest(name, leaves),
            )
    for name in [name for names in keep.values() for name in names if name not in reference]:
        fail(
            EmvaeError,
            "compare_gradients",
            f"measure the bias of the gradient by {name!r}",
            got=f"an exact gradient by {', '.join(map(repr, reference))} alone",
            because="a block's bias is over all its parameters",
            fix=f'Add reference={{"{name}": ...}}.',
        )
    return {
        block: _pick({n: g[None] for n, g in reference.items()}, leaves, names, 1)[0].double()
        for block, names in keep.items()
    }
