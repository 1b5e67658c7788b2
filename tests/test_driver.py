r"""The run loop: data, history, validation, callbacks, interruption, seeds, what is not finite, what it returns."""

from __future__ import annotations

import copy
import os
import signal
import threading
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_emvae import EM, SVI, MonteCarloELBO, problems
from pyro_emvae._checks import DataError, EmvaeError, NonFiniteError, StepError

X = torch.tensor([[0.3, -1.2], [1.7, 0.4], [-0.5, 2.2], [0.9, 0.8], [0.1, 0.2], [-1.0, 0.6]])
Y = torch.tensor([0.5, 1.0, -0.5, 2.0, 1.5, 0.0])


class Autoencoder:
    """A variational autoencoder of pairs; it writes down what it is called with."""

    def __init__(self, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        self.decoder = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout(dropout))
        self.encoder = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(dropout))
        self.calls: list[tuple] = []

    def model(self, x: Tensor, y: Tensor | None = None, *, weight: float = 1.0) -> None:
        self.calls.append((len(x), None if y is None else len(y), weight, x.dtype))
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), weight).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)
            if y is not None:
                pyro.sample("y", dist.Normal(z.sum(-1), 1.0), obs=y)

    def guide(self, x: Tensor, y: Tensor | None = None, *, weight: float = 1.0) -> None:
        pyro.module("encoder", self.encoder)
        loc, scale = self.encoder(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, scale.exp()).to_event(1))


def fitter(cls: type = SVI, vae: Autoencoder | None = None, **options: Any) -> tuple[Any, Autoencoder]:
    pyro.clear_param_store()
    vae = vae or Autoencoder()
    return cls(vae.model, vae.guide, pyro.optim.Adam({"lr": 0.01}), **options), vae


def run(svi: Any, number: int | None, *args: Any, **options: Any) -> Any:
    """`run` of either class with its own name for the number of iterations."""
    if isinstance(svi, EM):
        return svi.run(*args, max_iter=number, progress_bar=False, **options)
    return svi.run(number, *args, progress_bar=False, **options)


both = pytest.mark.parametrize("cls", [SVI, EM])


def everything(svi: Any, vae: Autoencoder) -> dict[str, Any]:
    """All that a run changes, for a comparison bit for bit."""
    state = {f"decoder.{n}": v for n, v in vae.decoder.state_dict().items()}
    state |= {f"encoder.{n}": v for n, v in vae.encoder.state_dict().items()}
    for name, saved in svi.optim.get_state().items():
        state |= {f"{name}.{k}": torch.as_tensor(v) for k, v in saved["state"][0].items()}
    return {n: v.clone() for n, v in state.items()} | {"generator": torch.get_rng_state()}


def assert_same(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [n for n, v in one.items() if not torch.equal(v, two[n])] == []


# Data -----------------------------------------------------------------------------------------------------------


def batches(kind: str) -> tuple[Any, dict[str, Any]]:
    """Three batches of two rows, in one of the forms that a run takes, and options that go with it."""
    pairs = [(X[i : i + 2], Y[i : i + 2]) for i in (0, 2, 4)]
    forms = {
        "loader": (DataLoader(TensorDataset(X, Y), batch_size=2), {}),
        "tuples": (pairs, {}),
        "lists": ([list(pair) for pair in pairs], {}),
        "dicts": ([{"x": x, "y": y} for x, y in pairs], {}),
        "to_args": (
            [{"images": x, "labels": y} for x, y in pairs],
            {"to_args": lambda b: ((b["images"], b["labels"]), {})},
        ),
        "keywords": ([(x, y) for x, y in pairs], {"to_args": lambda b: ((b[0],), {"y": b[1]})}),
    }
    return forms[kind]


@pytest.mark.parametrize("kind", ["loader", "tuples", "lists", "dicts", "to_args", "keywords"])
@both
def test_batches_in_every_form_are_the_same_fit(cls, kind):
    results = []
    for form in ("tuples", kind):
        svi, vae = fitter(cls)
        data, options = batches(form)
        fit = run(svi, None, data=data, num_epochs=2, seed=1, **options)
        assert fit.num_iterations == 6
        assert {call[:2] for call in vae.calls} == {(2, 2)}
        state = everything(svi, vae)
        if form == "loader":
            del state["generator"]  # a DataLoader takes a seed for its workers
        results.append((fit.history["objective"].values.tolist(), state))
    if kind != "loader":
        assert results[0][0] == results[1][0]
        assert_same(results[0][1], results[1][1])


@both
def test_a_tensor_batch_is_one_argument(cls):
    svi, vae = fitter(cls)
    run(svi, None, data=DataLoader(X, batch_size=4), num_epochs=1)
    assert {call[:2] for call in vae.calls} == {(4, None), (2, None)}


@pytest.mark.parametrize(
    ("number", "epochs", "expected"), [(None, None, 3), (None, 3, 9), (4, 3, 4), (7, None, 3), (2, None, 2)]
)
@both
def test_iterations_and_epochs(cls, number, epochs, expected):
    svi, _ = fitter(cls)
    seen = []
    fit = run(
        svi,
        number,
        data=batches("tuples")[0],
        num_epochs=epochs,
        callbacks=lambda p: seen.append((p.iteration, p.epoch)),
    )
    assert fit.num_iterations == expected
    assert seen == [(i, i // 3) for i in range(expected)]


@both
def test_keyword_arguments_go_to_model_and_guide(cls):
    svi, vae = fitter(cls)
    run(svi, 2, X, Y, weight=2.0)
    assert {call[:3] for call in vae.calls} == {(6, 6, 2.0)}


@both
def test_a_generator_serves_one_epoch(cls):
    svi, _ = fitter(cls)
    assert run(svi, None, data=iter(batches("tuples")[0])).num_iterations == 3
    with pytest.raises(DataError, match="after 1 epochs"):
        run(svi, None, data=Once(batches("tuples")[0]), num_epochs=2)


class Once:
    """Batches that are there once, which does not show before they are asked for again."""

    def __init__(self, rows: list) -> None:
        self.rows = iter(rows)

    def __iter__(self) -> Any:
        return self.rows


@both
@pytest.mark.parametrize("number", [None, 4])
def test_an_iterator_that_would_be_exhausted_is_refused_at_the_start(cls, number):
    svi, vae = fitter(cls)
    run(svi, 1, X)
    before, rows = everything(svi, vae), batches("tuples")[0]
    with pytest.raises(DataError, match=r"list_iterator for 2 epochs.*generator"):
        run(svi, number, data=iter(rows), num_epochs=2)
    with pytest.raises(DataError, match="validation= of type generator"):
        run(svi, 3, X, validation=(x for x in [X]))
    assert_same(everything(svi, vae), before)


@both
@pytest.mark.parametrize("backend", ["eager", "graph"])
def test_held_out_data_that_cannot_be_judged_change_nothing(cls, backend):
    svi, vae = fitter(cls, backend=backend)
    run(svi, 3, X)
    before = everything(svi, vae)
    with pytest.raises(NonFiniteError, match=r"^`validation=`.*nan"):
        run(svi, 40, X, validation=X.log(), every=40)
    with pytest.raises(RuntimeError, match="shapes") as raised:
        run(svi, None, data=batches("tuples")[0], validation=[X, X[:, :1]])
    assert "validation=" in raised.value.__notes__[0]
    assert_same(everything(svi, vae), before)


@both
def test_held_out_data_are_judged_before_the_first_update(cls):
    svi, vae = fitter(cls)
    before = {n: v.detach().clone() for n, v in vae.decoder.named_parameters()}
    with pytest.raises(NonFiniteError, match=r"^`validation=`.*nan"):
        run(svi, 40, X, validation=X.log(), every=40)
    assert svi.optim.get_state() == {}
    assert_same(dict(vae.decoder.named_parameters()), before)
    assert run(svi, 2, X, validation=X, every=1).num_iterations == 2


def test_a_generator_that_validation_and_training_share_serves_training():
    def fit(**options: Any) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(0)
        loaders = [DataLoader(TensorDataset(X), batch_size=2, shuffle=True, generator=generator) for _ in range(2)]
        svi, vae = fitter(vae=copy.deepcopy(start))
        run(svi, None, data=loaders[0], num_epochs=3, seed=0, **{n: loaders[1] for n in options})
        return everything(svi, vae)

    start = Autoencoder()
    assert_same(fit(validation=True), fit())


@both
def test_batches_are_moved_to_the_device(cls):
    svi, _ = fitter(cls)
    moved = []

    class Lazy(Tensor):
        def to(self, *args, **kwargs):
            moved.append(args)
            return torch.Tensor(self.as_subclass(Tensor))

    run(svi, 1, X.as_subclass(Lazy), device=torch.device("cpu"))
    assert moved and moved[0] == (torch.device("cpu"),)


NO_DATA = {
    "neither": ((None,), {}, "no number of iterations"),
    "both": ((3, X), {"data": [X]}, "1 arguments beside data="),
    "empty iterable": ((None,), {"data": []}, "without batches"),
    "epochs without data": ((3, X), {"num_epochs": 2}, "number of iterations"),
    "zero": ((0, X), {}, "got 0"),
    "not a number": ((2.5, X), {}, r"got 2\.5"),
    "zero epochs": ((None,), {"data": [X], "num_epochs": 0}, "got 0"),
    "empty tensor": ((3, X[:0]), {}, r"\(0, 2\)"),
    "empty batch": ((None,), {"data": [X, X[:0]]}, r"\(0, 2\)"),
    "empty validation": ((3, X), {"validation": []}, "validation without batches"),
    "unknown track": ((3, X), {"track": ["decodr"]}, "'decodr'"),
    "unknown policy": ((3, X), {"on_nonfinite": "ignore"}, "'ignore'"),
}


@pytest.mark.parametrize("key", NO_DATA)
def test_what_cannot_be_iterated_is_refused(key):
    args, options, observed = NO_DATA[key]
    svi, _ = fitter()
    with pytest.raises(EmvaeError, match=observed):
        svi.run(*args, progress_bar=False, **options)


# History --------------------------------------------------------------------------------------------------------


@both
def test_history_has_a_row_per_gradient_step_and_per_iteration(cls):
    svi, vae = fitter(cls)
    initial = vae.decoder[0].bias.detach().numpy().copy()
    fit = run(svi, 4, X, seed=0, track=["decoder$$$0.bias"])
    history, per = fit.history, 1 if cls is SVI else 2
    sizes = {"step": 4 * per, "iteration": 4, "iterate": 5, "decoder$$$0.bias_dim_0": 2}
    assert dict(history.sizes) == sizes | ({"half_step": 2} if cls is EM else {})
    assert history["phase"].values.tolist() == ([2] if cls is SVI else [0, 1]) * 4
    assert history["step_iteration"].values.tolist() == [i for i in range(4) for _ in range(per)]
    assert history["objective"].values.tolist() == history["elbo"].values[per - 1 :: per].tolist()
    assert (history["grad_norm"].values > 0).all()
    for time in ("time", "iteration_time"):
        assert (np.diff(history[time].values) >= 0).all()
    assert np.isnan(history["validation"].values).all()
    tracked = history["param_decoder$$$0.bias"].values
    assert np.array_equal(tracked[0], initial) and history["iterate"].values.tolist() == [0, 1, 2, 3, 4]
    assert tracked.shape == (5, 2) and np.array_equal(tracked[-1], fit.params["decoder$$$0.bias"].numpy())
    assert np.isnan(history["e_gain"].values).all() == (cls is SVI)


@both
def test_history_goes_to_netcdf(cls, tmp_path):
    import xarray as xr

    svi, _ = fitter(cls)
    history = run(svi, 3, X, seed=0, validation=X, track="encoder$$$0.bias").history
    history.to_netcdf(tmp_path / "history.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "history.nc", engine="h5netcdf") as read:
        assert read.equals(history)


def test_gradient_norms_are_those_of_the_gradient():
    problem = problems.normal_normal()
    svi = SVI(problem.model, problem.guide, pyro.optim.SGD({"lr": 1.0}))
    svi.step(*problem.args)
    before = {n: p.detach().clone() for n, p in svi.blocks.leaves().items()}
    fit = run(svi, 1, *problem.args)
    moved = torch.cat([(before[n] - p.detach()).flatten() for n, p in svi.blocks.leaves().items()])
    assert float(fit.history["grad_norm"][0]) == pytest.approx(float(moved.norm()), rel=1e-9)


# Validation and callbacks ---------------------------------------------------------------------------------------


FORMS = {
    "tensor": X[:3],
    "tuple": (X[:3], Y[:3]),
    "dict": {"x": X[:3]},
    "batches": [X[:2], X[2:4]],
    "loader": DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True),
}


@pytest.mark.parametrize("form", FORMS)
@both
def test_validation_is_recorded_per_epoch(cls, form):
    svi, vae = fitter(cls)
    seen = []
    fit = run(
        svi,
        None,
        data=batches("tuples")[0],
        num_epochs=3,
        validation=FORMS[form],
        callbacks=lambda p: seen.append(p.validation),
    )
    values = fit.history["validation"].values
    assert np.isfinite(values).tolist() == [False, False, True] * 3
    assert seen[2:5] == [values[2]] * 3 and seen[8] == values[8]
    assert vae.decoder.training and vae.encoder.training


@pytest.mark.parametrize(("every", "expected"), [(None, 20), (10, 4), (7, 6), (100, 1)])
def test_validation_without_epochs(every, expected):
    svi, _ = fitter()
    fit = run(svi, 40, X, validation=X, every=every)
    values = fit.history["validation"].values
    assert np.isfinite(values).sum() == expected and np.isfinite(values[-1])


def test_validation_is_the_loss_in_eval_mode_on_fixed_draws():
    svi, vae = fitter(vae=Autoencoder(dropout=0.5))
    fit = run(svi, 1, X, validation=[X[:3], X[3:]])
    vae.decoder.eval()
    vae.encoder.eval()
    pyro.set_rng_seed(0)
    losses = [svi.evaluate_loss(X[:3]), svi.evaluate_loss(X[3:])]
    assert float(fit.history["validation"][0]) == pytest.approx(-sum(losses) / 2, rel=1e-6)


@both
def test_validation_works_with_pyros_losses(cls):
    svi, _ = fitter(cls, loss=pyro.infer.TraceMeanField_ELBO())
    assert np.isfinite(run(svi, 2, X, validation=X).history["validation"].values).all()


@both
def test_a_callback_stops_by_returning_true(cls):
    svi, _ = fitter(cls)
    seen = []

    def callback(progress):
        seen.append(progress.loss)
        return progress.iteration == 2

    fit = run(svi, 10, X, callbacks=[callback, lambda progress: None])
    assert (fit.status, fit.num_iterations) == ("STOPPED", 3)
    assert seen == [-v for v in fit.history["objective"].values]


def test_a_truthy_answer_that_is_not_true_does_not_stop():
    svi, _ = fitter()
    assert run(svi, 3, X, callbacks=lambda progress: progress.history).status == "MAX_ITER"


def test_all_callbacks_are_called_although_the_first_stops():
    svi, _ = fitter()
    seen = []
    run(svi, 3, X, callbacks=[lambda p: True, lambda p: seen.append(p.iteration)])
    assert seen == [0]


@both
def test_a_callback_sees_the_progress(cls):
    svi, vae = fitter(cls)
    seen = []
    run(svi, 2, X, callbacks=seen.append)
    assert [p.iteration for p in seen] == [0, 1]
    assert seen[0].model == vae.model and seen[0].guide == vae.guide
    assert len(seen[1].history.iterations) == 2
    assert "loss" in repr(seen[0]) and "model" not in repr(seen[0])


def test_an_error_in_a_callback_is_the_users():
    svi, vae = fitter()

    def callback(progress):
        vae.decoder.eval()
        vae.decoder(X)
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        run(svi, 3, X, callbacks=callback)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    run(svi, 2, X)


# Ctrl-C ---------------------------------------------------------------------------------------------------------


def raise_interrupt() -> None:
    raise KeyboardInterrupt


def press_ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("how", [raise_interrupt, press_ctrl_c])
@both
def test_ctrl_c_returns_what_there_is(cls, how):
    svi, vae = fitter(cls)
    before = signal.getsignal(signal.SIGINT)
    fit = run(svi, 10, X, seed=0, callbacks=lambda p: how() if p.iteration == 3 else None)
    assert (fit.status, fit.num_iterations) == ("INTERRUPTED", 4)
    assert dict(fit.history.sizes)["iteration"] == 4
    assert signal.getsignal(signal.SIGINT) is before
    state = everything(svi, vae)
    assert run(svi, 2, X).status == "MAX_ITER"
    expected, other = fitter(cls)
    run(expected, 4, X, seed=0)
    assert_same(state, everything(expected, other))


def test_ctrl_c_within_a_step_does_not_tear_the_update():
    svi, _ = fitter()
    guide, calls = svi.engine.guide, []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            press_ctrl_c()
        return guide(*args, **kwargs)

    svi.engine.guide = interrupted
    fit = run(svi, 10, X)
    assert fit.status == "INTERRUPTED" and fit.num_iterations >= 1
    counts = {int(s["state"][0]["step"]) for s in svi.optim.get_state().values()}
    assert counts == {fit.num_iterations}


def test_a_second_ctrl_c_interrupts_at_once():
    svi, _ = fitter()

    def callback(progress):
        press_ctrl_c()
        press_ctrl_c()

    assert run(svi, 5, X, callbacks=callback).status == "INTERRUPTED"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_handler_of_ctrl_c_is_left_in_place():
    seen = []

    def own(number, frame):
        seen.append(number)

    previous = signal.signal(signal.SIGINT, own)
    try:
        svi, _ = fitter()
        fit = run(svi, 4, X, callbacks=lambda p: press_ctrl_c() if p.iteration == 1 else None)
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        signal.signal(signal.SIGINT, previous)
    assert seen == [signal.SIGINT] and fit.status == "MAX_ITER"


def test_a_run_in_a_thread():
    svi, _ = fitter()
    fits = []
    thread = threading.Thread(target=lambda: fits.append(run(svi, 3, X)))
    thread.start()
    thread.join()
    assert fits[0].status == "MAX_ITER"


# Seeds ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "graph"])
@both
def test_two_runs_of_one_seed_are_the_same_bit_for_bit(cls, backend):
    results = []
    for noise in (1, 2):
        svi, vae = fitter(cls, vae=Autoencoder(dropout=0.3), backend=backend)
        torch.manual_seed(noise)
        np.random.seed(noise)
        loader = DataLoader(TensorDataset(X, Y), batch_size=3, shuffle=True)
        fit = run(svi, None, data=loader, num_epochs=3, seed=5, validation=X)
        results.append((fit.history.drop_vars(["time", "iteration_time"]), everything(svi, vae), np.random.rand()))
    assert results[0][0].identical(results[1][0])
    assert_same(results[0][1], results[1][1])
    assert results[0][2] == results[1][2]


def test_another_seed_is_another_run():
    objectives = []
    for seed in (0, 1):
        svi, _ = fitter()
        objectives.append(run(svi, 2, X, seed=seed).history["objective"].values.tolist())
    assert objectives[0] != objectives[1]


# What is not finite ---------------------------------------------------------------------------------------------


class Fragile:
    """A model that breaks at one of its calls; `where`: in the value of the objective or in its gradient only."""

    def __init__(self, where: str = "objective") -> None:
        self.calls, self.broken, self.where = 0, (), where

    def model(self, x: Tensor) -> None:
        self.calls += 1
        bad = self.calls in self.broken
        scale = pyro.param("scale", torch.tensor(1.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        if bad and self.where == "gradient":
            z = z + (scale - scale).abs().sqrt()
        pyro.sample(
            "x",
            dist.Normal(z * scale, 1.0).expand([len(x)]).to_event(1),
            obs=x * torch.nan if bad and self.where == "objective" else x,
        )

    def guide(self, x: Tensor) -> None:
        pyro.sample("z", dist.Normal(pyro.param("loc", torch.tensor(0.5)), 0.5))


def fragile(cls: type, policy: str = "raise", where: str = "objective") -> tuple[Any, Fragile]:
    pyro.clear_param_store()
    user = Fragile(where)
    svi = cls(user.model, user.guide, pyro.optim.Adam({"lr": 0.05}), on_nonfinite=policy)
    pyro.set_rng_seed(0)
    svi.step(Y)
    user.calls = 0
    return svi, user


def state_of(svi: Any) -> dict[str, Tensor]:
    state = {n: v.detach().clone() for n, v in pyro.get_param_store().items()}
    for name, saved in svi.optim.get_state().items():
        state |= {f"{name}.{k}": torch.as_tensor(v) for k, v in saved["state"][0].items()}
    return state


WHERE = {"objective": "site 'x'", "gradient": "parameter 'scale'"}


@pytest.mark.parametrize("where", WHERE)
@both
def test_the_policy_raise_names_the_place_and_changes_nothing(cls, where):
    svi, user = fragile(cls, where=where)
    states = []
    user.broken = (3,) if cls is SVI else (6,)  # EM: the M-step of the third iteration
    with pyro.validation_enabled(False), pytest.raises(NonFiniteError, match=WHERE[where]):
        run(svi, 5, Y, seed=0, callbacks=lambda p: states.append(state_of(svi)))
    assert len(states) == 2
    if cls is SVI:
        assert_same(state_of(svi), states[-1])
    assert_same(
        {n: v for n, v in state_of(svi).items() if n.startswith("scale")},
        {n: v for n, v in states[-1].items() if n.startswith("scale")},
    )
    with pytest.raises(StepError, match="recover"):
        svi.step(Y)
    with pytest.raises(StepError, match="recover"):
        run(svi, 1, Y)
    svi.recover()
    svi.step(Y)


@pytest.mark.parametrize("where", WHERE)
def test_the_policy_skip_leaves_out_the_update(where):
    svi, user = fragile(SVI, "raise", where)
    states = [state_of(svi)]
    user.broken = (3,)
    with pyro.validation_enabled(False):
        fit = run(svi, 5, Y, seed=0, on_nonfinite="skip", callbacks=lambda p: states.append(state_of(svi)))
    assert fit.status == "NAN" and fit.num_iterations == 5
    assert np.isnan(fit.history["objective"].values).tolist() == [False, False, True, False, False]
    assert_same(states[3], states[2])
    assert not torch.equal(states[4]["loc"], states[3]["loc"])
    assert svi.engine.on_nonfinite == "raise"
    assert len(fit.history["elbo"]) == 4


@pytest.mark.parametrize("where", WHERE)
def test_the_policy_revert_goes_back_before_the_last_update(where):
    svi, user = fragile(SVI, "revert", where)
    states = [state_of(svi)]
    user.broken = (3, 4)
    with pyro.validation_enabled(False):
        fit = run(svi, 6, Y, seed=0, callbacks=lambda p: states.append(state_of(svi)))
    assert fit.status == "NAN"
    assert_same(states[3], states[1])
    assert_same(states[4], states[3])
    assert not torch.equal(states[5]["loc"], states[4]["loc"])


def test_revert_does_not_go_back_to_an_earlier_run():
    svi, user = fragile(SVI, "revert")
    run(svi, 2, Y)
    run(svi, 3, Y, on_nonfinite="raise")
    before = state_of(svi)
    user.broken = (user.calls + 1,)
    with pyro.validation_enabled(False):
        run(svi, 1, Y)
    assert_same(state_of(svi), before)


@pytest.mark.parametrize("policy", ["skip", "revert"])
def test_em_goes_on_with_the_other_half_step(policy):
    svi, user = fragile(EM, policy)
    user.broken = (3,)
    with pyro.validation_enabled(False):
        fit = run(svi, 4, Y, seed=0)
    assert fit.status == "NAN" and fit.num_iterations == 4
    assert fit.history["phase"].values.tolist() == [0, 1, 1, 0, 1, 0, 1]
    assert all(bool(torch.isfinite(v).all()) for v in fit.params.values())


# What it returns ------------------------------------------------------------------------------------------------


@both
def test_fit_carries_parameters_blocks_and_provenance(cls):
    svi, vae = fitter(cls)
    fit = run(svi, 2, X, seed=4)
    assert repr(fit) == "Fit(status='MAX_ITER', num_iterations=2)"
    assert fit.model == vae.model and fit.guide == vae.guide
    assert set(fit.params) == set(fit.blocks) == set(pyro.get_param_store().keys())
    assert {b for n, b in fit.blocks.items() if n.startswith("decoder")} == {"model"}
    assert {b for n, b in fit.blocks.items() if n.startswith("encoder")} == {"guide"}
    assert all(torch.equal(v, pyro.param(n)) and not v.requires_grad for n, v in fit.params.items())
    kept = {n: v.clone() for n, v in fit.params.items()}
    svi.step(X)
    assert all(torch.equal(v, kept[n]) for n, v in fit.params.items())
    expected = {"seed": 4, "device": "cpu", "dtype": "torch.float32", "loss": "MonteCarloELBO", "backend": "eager"}
    assert {k: fit.provenance[k] for k in expected} == expected
    assert fit.provenance["data"] == ["(6, 2) torch.float32"]
    (estimator,) = fit.provenance["estimators"]
    assert estimator.startswith("z: Pathwise(entropy=Analytic()")
    with pytest.raises(AttributeError):
        fit.status = "CONVERGED"


@both
def test_summary_is_a_table(cls):
    svi, _ = fitter(cls)
    fit = run(svi, 2, X)
    table = fit.summary()
    assert list(table.columns) == ["parameter", "block", "shape", "estimate", "standard_error", "status"]
    assert table["standard_error"].isna().all()
    assert table["parameter"].tolist() == list(fit.params)
    assert set(table["status"]) == {"MAX_ITER"}


@both
def test_many_iterations_are_no_claim_of_convergence(cls):
    problem = problems.normal_normal()
    svi = cls(problem.model, problem.guide, pyro.optim.SGD({"lr": 0.0}))
    assert run(svi, 30, *problem.args).status == "MAX_ITER"


def test_constrained_values_are_returned():
    problem = problems.normal_normal()
    fit = run(SVI(problem.model, problem.guide, pyro.optim.SGD({"lr": 0.0})), 1, *problem.args)
    for name, value in problem.params.items():
        torch.testing.assert_close(fit.params[name], value)


@pytest.mark.parametrize("shown", [True, False])
def test_the_progress_bar(capsys, shown):
    svi, _ = fitter()
    svi.run(3, X, progress_bar=shown)
    assert ("0/3" in capsys.readouterr().err) == shown


def test_the_progress_bar_is_off_where_there_is_no_terminal(capsys):
    svi, _ = fitter()
    svi.run(3, X)
    assert capsys.readouterr().err == ""


def test_a_run_goes_on_where_the_last_one_stopped():
    results = []
    for parts in ([6], [2, 3, 1]):
        svi, vae = fitter()
        pyro.set_rng_seed(0)
        for number in parts:
            run(svi, number, X)
        results.append(everything(svi, vae))
    assert_same(*results)


def test_em_has_a_default_number_of_iterations():
    problem = problems.normal_normal()
    em = EM(problem.model, problem.guide, pyro.optim.Adam({"lr": 0.01}), MonteCarloELBO())
    assert em.run(*problem.args, callbacks=lambda p: p.iteration == 3).num_iterations == 4
