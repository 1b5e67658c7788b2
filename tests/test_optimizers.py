r"""Every rule against torch's or Pyro's own optimizer, number by number; then what a block does with them."""

from __future__ import annotations

import copy
import functools

import pyro
import pytest
import torch
from pyro.optim import PyroOptim
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_emvae import optimizers as ours
from pyro_emvae._checks import OptimizerError
from pyro_emvae.optimizers import BlockOptimizer, OptimView

SHAPES = {"weight": (3, 2), "bias": (4,), "scale": ()}
DTYPES = [torch.float32, torch.float64]

RULES = [
    ours.SGD(lr=0.1),
    ours.SGD(lr=0.1, weight_decay=0.1, maximize=True),
    ours.SGD(lr=0.1, momentum=0.9),
    ours.SGD(lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    ours.SGD(lr=0.1, momentum=0.9, nesterov=True),
    ours.Adam(lr=0.05),
    ours.Adam(lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1),
    ours.Adam(lr=0.05, amsgrad=True),
    ours.Adam(lr=0.05, maximize=True, weight_decay=0.1),
    ours.AdamW(lr=0.05),
    ours.AdamW(lr=0.05, weight_decay=0.3, amsgrad=True, maximize=True),
    ours.AdamW(lr=0.05, weight_decay=0.0),
    ours.ClippedAdam(lr=0.05),
    ours.ClippedAdam(lr=0.05, clip_norm=0.5, lrd=0.97, weight_decay=0.1),
    ours.ClippedAdam(lr=0.05, betas=(0.8, 0.95), centered_variance=True),
    ours.RMSprop(lr=0.02),
    ours.RMSprop(lr=0.02, alpha=0.9, eps=1e-3, weight_decay=0.1),
    ours.RMSprop(lr=0.02, momentum=0.8, centered=True),
    ours.RMSprop(lr=0.02, centered=True, maximize=True),
    ours.Adagrad(lr=0.1),
    ours.Adagrad(lr=0.1, lr_decay=0.05, weight_decay=0.1, initial_accumulator_value=0.2, eps=1e-4),
    ours.Adagrad(lr=0.1, maximize=True),
]


def described(rule):
    default = type(rule)()
    changed = {k: v for k, v in vars(rule).items() if v != getattr(default, k)}
    return f"{type(rule).__name__}({', '.join(f'{k}={v}' for k, v in changed.items())})"


each_rule = pytest.mark.parametrize("rule", RULES, ids=described)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def make_params(dtype=torch.float64, shapes=SHAPES, device=None):
    generator = torch.Generator().manual_seed(1)
    values = {n: torch.randn(shape, generator=generator, dtype=dtype) for n, shape in shapes.items()}
    return {n: v.to(device).requires_grad_() for n, v in values.items()}


def copy_of(params):
    return {n: p.detach().clone().requires_grad_() for n, p in params.items()}


def grads_at(step, params):
    """Gradients of all magnitudes, the same for every caller."""
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) * 3 for p in params.values()]


def twin_of(rule, params):
    return rule.twin(list(params.values()), **vars(rule))


def set_grads(params, grads):
    for p, g in zip(params.values(), grads, strict=True):
        p.grad = None if g is None else g.clone()


def step_torch(optimizer, params, grads):
    set_grads(params, grads)
    optimizer.step()


def assert_same(a, b, bitwise=True):
    for name in a:
        if bitwise:
            assert torch.equal(a[name], b[name]), name
        else:
            tolerance = 1e-12 if a[name].dtype is torch.float64 else 1e-6
            atol = tolerance * a[name].detach().abs().max().clamp(min=1).item()
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=atol)


# ------------------------------------------------------------------------------------------------ rules


@each_rule
@each_dtype
def test_rule_equals_its_twin(rule, dtype, device):
    theirs, mine = make_params(dtype, device=device), make_params(dtype, device=device)
    twin, params = twin_of(rule, theirs), list(mine.values())
    slots = rule.init([p.detach() for p in params])
    for step in range(1, 101):
        step_torch(twin, theirs, grads_at(step, theirs))
        rule.update(params, grads_at(step, mine), slots, rule.scalars(step))
    # On one's own schedule lr * lrd**t is a power, not a product: the last digit may differ.
    exact = rule.decay == 1 and device.type == "cpu"
    assert_same(theirs, mine, bitwise=exact)
    for i, p in enumerate(theirs.values()):
        saved = {k: v for k, v in twin.state[p].items() if k != "step"}
        assert saved.keys() == slots.keys()
        assert_same(saved, {k: v[i] for k, v in slots.items()}, bitwise=exact)


@each_rule
def test_large_tensors_are_updated_in_pieces(rule):
    """A last piece that is not full, a large tensor that cannot be cut, and a gradient in another layout."""
    shapes = {"large": (400, 1000), "small": (5,), "transposed": (1000, 300)}
    theirs, mine = make_params(torch.float32, shapes), make_params(torch.float32, shapes)
    for params in (theirs, mine):
        params["transposed"] = params["transposed"].detach().T.requires_grad_()
    twin, params = twin_of(rule, theirs), list(mine.values())
    slots = rule.init([p.detach() for p in params])
    for step in (1, 2, 3):
        grads = grads_at(step, theirs)
        grads[0] = grads[0].T.contiguous().T
        step_torch(twin, theirs, grads)
        rule.update(params, grads, slots, rule.scalars(step))
    assert_same(theirs, mine, bitwise=rule.decay == 1)


@each_rule
@each_dtype
def test_recorded_update_equals_eager(rule, dtype, device):
    """One graph of step 1, replayed 100 times with the scalars of each step."""
    eager, recorded = make_params(dtype, device=device), make_params(dtype, device=device)
    left, right = [p.detach() for p in eager.values()], [p.detach() for p in recorded.values()]
    slots = {"eager": rule.init(left), "recorded": rule.init(right)}

    def as_tensors(step):
        return {k: torch.tensor(v, dtype=torch.float64) for k, v in rule.scalars(step).items()}

    def update(params, grads, slots, scalars):
        rule.update(params, grads, slots, scalars)
        return params

    scratch = copy.deepcopy((right, slots["recorded"]))
    graph = make_fx(update)(scratch[0], grads_at(1, recorded), scratch[1], as_tensors(1))
    for step in range(1, 101):
        rule.update(left, grads_at(step, eager), slots["eager"], rule.scalars(step))
        graph(right, grads_at(step, recorded), slots["recorded"], as_tensors(step))
    assert_same(eager, recorded, bitwise=False)


@each_rule
def test_update_reads_grads_only(rule):
    params = make_params()
    grads = grads_at(1, params)
    before = copy.deepcopy(grads)
    rule.update(list(params.values()), grads, rule.init([p.detach() for p in params.values()]), rule.scalars(1))
    assert all(map(torch.equal, grads, before))


def test_scalars_are_floats_of_the_given_rate():
    assert ours.Adam(lr=1.0, betas=(0.5, 0.75)).scalars(2, lr=3.0) == {"minus_step": -4.0, "correction": 0.4375**0.5}
    assert ours.ClippedAdam(lr=1.0, lrd=0.5).scalars(3) == ours.ClippedAdam(lr=0.125).scalars(3)


# ------------------------------------------------------------------------------------------------ blocks against torch


@each_rule
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_block_equals_torch_with_missing_gradients(rule, dtype):
    theirs, mine = make_params(dtype), make_params(dtype)
    twin, block = twin_of(rule, theirs), BlockOptimizer.from_user(rule, mine)
    for step in range(1, 101):
        grads = grads_at(step, mine)
        if rule.decay == 1:
            grads = [None if step % (k + 2) == 0 else g for k, g in enumerate(grads)]
        before = copy.deepcopy([p.detach() for p in block.params])
        step_torch(twin, theirs, grads)
        block.step(grads)
        assert all(torch.equal(p, b) for p, b, g in zip(block.params, before, grads, strict=True) if g is None)
    assert_same(theirs, mine)
    assert block.recordable


def test_none_leaves_slots_and_count():
    params = make_params()
    block = BlockOptimizer.from_user(ours.Adam(), params)
    block.step(grads_at(1, params))
    before = copy.deepcopy(block.state)
    block.step([None, *grads_at(2, params)[1:]])
    after = block.state
    assert after["count"]["weight"] == 1 and after["count"]["bias"] == 2
    assert_same(before["slots"]["weight"], after["slots"]["weight"])
    assert sorted(len(g.indices) for g in block.groups()) == [1, 2]


FROM_USER = {
    "class": torch.optim.Adam,
    "partial": functools.partial(torch.optim.RMSprop, lr=0.01, centered=True),
    "function": lambda ps: torch.optim.Adam([{"params": ps[1:], "lr": 0.1}, {"params": ps[:1], "betas": [0.8, 0.9]}]),
    "tensor_lr": lambda ps: torch.optim.SGD(ps, lr=torch.tensor(0.1)),
    "adam_decoupled": functools.partial(torch.optim.Adam, decoupled_weight_decay=True, weight_decay=0.1),
    "pyro_class": functools.partial(pyro.optim.clipped_adam.ClippedAdam, lrd=0.99),
    "nadam": torch.optim.NAdam,
    "nadam_groups": lambda ps: torch.optim.NAdam([{"params": ps[1:], "lr": 0.1}, {"params": ps[:1]}]),
    "adagrad_rmsprop": pyro.optim.adagrad_rmsprop.AdagradRMSProp,
}


@pytest.mark.parametrize("kind", FROM_USER)
def test_torch_optimizers(kind):
    theirs, mine = make_params(), make_params()
    optimizer, block = FROM_USER[kind](list(theirs.values())), BlockOptimizer.from_user(FROM_USER[kind], mine)
    for step in range(1, 101):
        grads = [
            None if step % (k + 5) == 0 and kind != "pyro_class" else g for k, g in enumerate(grads_at(step, mine))
        ]
        step_torch(optimizer, theirs, grads)
        block.step(grads)
    assert_same(theirs, mine)
    assert block.recordable == (kind not in ("nadam", "nadam_groups", "adagrad_rmsprop"))
    assert all(p.grad is None for p in block.params)
    other = BlockOptimizer.from_user(FROM_USER[kind], mine)
    other.load_state(block.state)
    assert [v for v in other.state["lr"].values()] == [v for v in block.state["lr"].values()]


@each_rule
def test_hand_over_to_and_from_torch(rule):
    """Mid-run, a torch optimizer and a block swap their state dicts, and go on as if nothing had happened."""
    reference, theirs, mine = make_params(), make_params(), make_params()
    straight, twin = twin_of(rule, reference), twin_of(rule, theirs)
    block = BlockOptimizer.from_user(rule, mine)
    for step in range(1, 31):
        for optimizer, params in ((straight, reference), (twin, theirs)):
            step_torch(optimizer, params, grads_at(step, params))
        block.step(grads_at(step, mine))
    fresh, new = rule.twin(list(mine.values()), lr=9.0), BlockOptimizer.from_user(rule.twin, theirs)
    fresh.load_state_dict(block.state_dict())
    new.load_state_dict(twin.state_dict())
    for step in range(31, 61):
        step_torch(straight, reference, grads_at(step, reference))
        step_torch(fresh, mine, grads_at(step, mine))
        new.step(grads_at(step, theirs))
    assert_same(reference, mine)
    assert_same(reference, theirs)


@pytest.mark.parametrize("kind", ["function", "nadam_groups"])
def test_hand_over_of_several_groups(kind):
    make = FROM_USER[kind]
    dtype = torch.float32 if "nadam" in kind else torch.float64  # on loading, torch casts NAdam's mu_product
    reference, theirs, mine = make_params(dtype), make_params(dtype), make_params(dtype)
    straight, optimizer = make(list(reference.values())), make(list(theirs.values()))
    block = BlockOptimizer.from_user(make, mine)
    assert [len(g["params"]) for g in block.state_dict()["param_groups"]] == [2, 1]
    for step in range(1, 21):
        for o, params in ((straight, reference), (optimizer, theirs)):
            step_torch(o, params, grads_at(step, params))
        block.step(grads_at(step, mine))
    fresh, new = make(list(mine.values())), BlockOptimizer.from_user(make, theirs)
    fresh.load_state_dict(block.state_dict())
    new.load_state_dict(optimizer.state_dict())
    for step in range(21, 41):
        step_torch(straight, reference, grads_at(step, reference))
        step_torch(fresh, mine, grads_at(step, mine))
        new.step(grads_at(step, theirs))
    assert_same(reference, mine)
    assert_same(reference, theirs)


def test_state_dict_before_the_first_step():
    for rule in RULES:
        theirs, mine = make_params(), make_params()
        twin = rule.twin(list(theirs.values()), **vars(rule))
        twin.load_state_dict(BlockOptimizer.from_user(rule, mine).state_dict())
        block = BlockOptimizer.from_user(rule.twin, mine)
        block.load_state_dict(twin.state_dict())
        for step in (1, 2):
            step_torch(twin, theirs, grads_at(step, theirs))
            block.step(grads_at(step, mine))
        assert_same(theirs, mine)


def test_own_state_dict_is_matched_by_name_and_is_a_copy():
    mine = make_params()
    block = BlockOptimizer.from_user(torch.optim.Adam, mine)
    block.step(grads_at(1, mine))
    OptimView({"all": block}).optim_objs[mine["weight"]].param_groups[0]["lr"] = 0.5
    saved = block.state_dict()
    other = BlockOptimizer.from_user(torch.optim.Adam, dict(reversed(copy_of(mine).items())))
    other.load_state_dict(saved)
    block.step(grads_at(2, mine))
    other.step(grads_at(2, mine)[::-1])
    assert_same(mine, dict(zip(other.names, other.params, strict=True)))
    assert saved["state"][0]["step"] == 1


@each_rule
def test_state_is_a_pytree_and_round_trips(rule, tmp_path):
    mine = make_params()
    block = BlockOptimizer.from_user(rule, mine)
    for step in range(1, 6):
        block.step(grads_at(step, mine))
    leaves, _ = torch.utils._pytree.tree_flatten(block.state)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves)
    torch.save(block.state, tmp_path / "state.pt")
    twin = copy_of(mine)
    other = BlockOptimizer.from_user(rule, twin)
    live = other.slots
    other.load_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert all(a is b for a, b in zip(live, other.slots, strict=True))
    for step in range(6, 11):
        block.step(grads_at(step, mine))
        other.step(grads_at(step, twin))
    assert_same(mine, twin)


# ------------------------------------------------------------------------------------------------ blocks against Pyro


def store(params):
    """Register the parameters with Pyro and return their leaves."""
    return {n: pyro.param(n, p.detach().clone()).unconstrained() for n, p in params.items()}


NAMES = {"net$$$layer.weight": (3, 2), "net$$$layer.bias": (4,), "scale": (), "loc": (2,)}


def by_name(name):
    return {"lr": 0.1, "betas": (0.8, 0.99)} if name == "net.layer.bias" else {"lr": 0.02}


def by_module(module, name):
    return {"lr": 0.1} if (module, name) == ("net", "layer.bias") else {"lr": 0.02, "weight_decay": 0.1}


def clip_by_module(module, name):
    return {"clip_norm": 1.0} if module == "net" else {"clip_value": 0.5, "clip_norm": 2.0} if name == "loc" else {}


PYRO = {
    "dict": lambda: pyro.optim.Adam({"lr": 0.05, "betas": [0.9, 0.99]}),
    "name": lambda: pyro.optim.Adam(by_name),
    "module_and_name": lambda: pyro.optim.Adam(by_module),
    "clip_norm": lambda: pyro.optim.SGD({"lr": 0.05, "momentum": 0.9}, {"clip_norm": 1.5}),
    "clip_value": lambda: pyro.optim.RMSprop({"lr": 0.05}, {"clip_value": 0.7}),
    "clip_by_module": lambda: pyro.optim.Adam({"lr": 0.05}, clip_by_module),
    "clipped_adam": lambda: pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.98, "clip_norm": 1.0}),
    "adagrad": lambda: pyro.optim.Adagrad({"lr": 0.05, "lr_decay": 0.1}),
    "adamw": lambda: pyro.optim.AdamW({"lr": 0.05}),
    "own_class": lambda: PyroOptim(torch.optim.SGD, {"lr": 0.05, "momentum": 0.5, "dampening": 0.5}),
    "adagrad_rmsprop": lambda: pyro.optim.AdagradRMSProp({"eta": 0.1}),
    "dct_adam": lambda: pyro.optim.DCTAdam({"lr": 0.1}),
    "nadam_clip": lambda: pyro.optim.NAdam({"lr": 0.1}, clip_by_module),
}


@pytest.mark.parametrize("kind", PYRO)
@each_dtype
def test_block_equals_pyro(kind, dtype):
    params = make_params(dtype, NAMES)
    theirs, mine = store(params), copy_of(params)
    reference, block = PYRO[kind](), BlockOptimizer.from_user(PYRO[kind](), mine)
    for step in range(1, 101):
        grads = grads_at(step, mine)
        set_grads(theirs, grads)
        reference(list(theirs.values()))
        block.step(grads)
    assert_same(theirs, mine)


SCHEDULERS = {
    "exponential": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
    ),
    "step": lambda: pyro.optim.StepLR(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "step_size": 3, "gamma": 0.5}
    ),
    "multi_step": lambda: pyro.optim.MultiStepLR(
        {"optimizer": torch.optim.RMSprop, "optim_args": by_lr, "milestones": [2, 9], "gamma": 0.5}, {"clip_norm": 1.0}
    ),
    "plateau": lambda: pyro.optim.ReduceLROnPlateau(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "patience": 1, "factor": 0.3}
    ),
    "one_cycle": lambda: pyro.optim.OneCycleLR(
        {"optimizer": torch.optim.Adam, "optim_args": {"lr": 0.1}, "max_lr": 0.2, "total_steps": 30}
    ),
    "clipped_adam": lambda: pyro.optim.ExponentialLR(
        {"optimizer": pyro.optim.clipped_adam.ClippedAdam, "optim_args": {"lr": 0.1, "lrd": 0.9}, "gamma": 0.9}
    ),
    "nadam": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.NAdam, "optim_args": {"lr": 0.1}, "gamma": 0.9}
    ),
}


def by_lr(name):
    return {"lr": 0.1 if name == "loc" else 0.03}


def scheduler_args(kind, epoch):
    return (float(abs(epoch - 5)),) if kind == "plateau" else ()


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_schedulers(kind):
    params = make_params(shapes=NAMES)
    theirs, mine = store(params), copy_of(params)
    reference, block = SCHEDULERS[kind](), BlockOptimizer.from_user(SCHEDULERS[kind](), mine)
    view = OptimView({"all": block})
    rates = set()
    for step in range(1, 61):
        set_grads(theirs, grads_at(step, mine))
        reference(list(theirs.values()))
        block.step(grads_at(step, mine))
        if step % 3 == 0:
            reference.step(*scheduler_args(kind, step // 3))
            view.step(*scheduler_args(kind, step // 3))
        used = [reference.optim_objs[p].optimizer.param_groups[0]["lr"] for p in theirs.values()]
        assert used == [view.optim_objs[p].optimizer.param_groups[0]["lr"] for p in mine.values()]
        rates.add(used[0])
    assert len(rates) > 2
    assert_same(theirs, mine)
    assert block.recordable == (kind not in ("one_cycle", "nadam"))
    mirror = view.optim_objs[mine["loc"]]
    assert mirror.optimizer.param_groups[0]["lr"] == used[-1]
    assert mirror.get_last_lr() == reference.optim_objs[theirs["loc"]].get_last_lr()


@pytest.mark.parametrize("kind", ["clipped_adam", "name", "own_class", "adagrad", "adagrad_rmsprop", "nadam_clip"])
def test_pyro_state_in_both_directions(kind, tmp_path):
    params = make_params(torch.float32, NAMES)
    theirs, mine = store(params), copy_of(params)
    reference, block = PYRO[kind](), BlockOptimizer.from_user(PYRO[kind](), mine)
    check_pyro_hand_over(PYRO[kind], reference, block, theirs, mine, tmp_path)


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_pyro_scheduler_state_in_both_directions(kind, tmp_path):
    params = make_params(torch.float32, NAMES)
    theirs, mine = store(params), copy_of(params)
    reference, block = SCHEDULERS[kind](), BlockOptimizer.from_user(SCHEDULERS[kind](), mine)
    check_pyro_hand_over(SCHEDULERS[kind], reference, block, theirs, mine, tmp_path, kind)


def check_pyro_hand_over(make, reference, block, theirs, mine, folder, kind=None):
    """Ours saves for Pyro, Pyro saves for ours, and a third, live, takes ours over: all go on alike."""

    def both(a, b, steps, named_a, named_b):
        for step in steps:
            for optim, named in ((a, named_a), (b, named_b)):
                set_grads(named, grads_at(step, named))
                optim(list(named.values()))
                if kind and step % 3 == 0:
                    optim.step(*scheduler_args(kind, step // 3))

    view = OptimView({"all": block})
    both(reference, view, range(1, 14), theirs, mine)
    reference.save(folder / "theirs.pt")
    view.save(folder / "mine.pt")

    third = {n: p.detach().clone().requires_grad_() for n, p in mine.items()}
    loaded, live = make(), BlockOptimizer.from_user(make(), third)
    live.step(grads_at(99, third))
    with torch.no_grad():
        for n, p in third.items():
            p.copy_(mine[n])
    live.set_state(block.get_state())
    loaded.load(folder / "mine.pt")
    warm = make()
    warm.load(folder / "theirs.pt")
    waiting = OptimView({"all": BlockOptimizer.from_user(warm, mine)})
    both(loaded, waiting, range(14, 31), theirs, mine)
    thirds = OptimView({"all": live})
    for step in range(14, 31):
        set_grads(third, grads_at(step, third))
        thirds(list(third.values()))
        if kind and step % 3 == 0:
            thirds.step(*scheduler_args(kind, step // 3))
    assert_same(theirs, mine)
    assert_same(theirs, third)


@pytest.mark.parametrize("make", [PYRO["name"], SCHEDULERS["exponential"]], ids=["adam", "exponential"])
def test_used_pyro_optimizer_hands_over_its_state(make):
    """Five steps of Pyro's, five of a block made from it, five of one made from the first one's view."""
    params = make_params(shapes=NAMES)
    theirs, mine = store(params), copy_of(params)
    optim, reference = make(), BlockOptimizer.from_user(make(), mine)
    steppers = [optim]
    for k in range(3):
        for step in range(5 * k, 5 * k + 5):
            set_grads(theirs, grads_at(step, theirs))
            steppers[k](list(theirs.values()))
            reference.step(grads_at(step, mine))
            if isinstance(optim, pyro.optim.PyroLRScheduler):
                steppers[k].step()
                reference.scheduler_step()
        steppers.append(OptimView({"all": BlockOptimizer.from_user(steppers[k], theirs)}))
    assert_same(theirs, mine)
    assert steppers[-1].user is optim


# ------------------------------------------------------------------------------------------------ groups and the view


def test_groups_follow_the_live_options():
    mine = make_params(shapes=NAMES)
    block = BlockOptimizer.from_user(pyro.optim.Adam(by_name, {"clip_norm": 1.0}), mine)
    assert [g.indices for g in block.groups()] == [(0, 2, 3), (1,)]
    assert block.groups()[0].clip_norm == 1.0
    signatures = [g.signature for g in block.groups()]
    objs = OptimView({"all": block}).optim_objs
    assert list(map(id, objs)) == list(map(id, mine.values()))
    for view in objs.values():
        view.param_groups[0]["lr"] *= 0.5
    assert [g.rule.lr for g in block.groups()] == [0.01, 0.05]
    assert [g.signature for g in block.groups()] == signatures
    objs[mine["loc"]].param_groups[0]["weight_decay"] = 0.1
    assert [g.indices for g in block.groups()] == [(0, 2), (1,), (3,)]
    objs[mine["loc"]].param_groups[0]["amsgrad"] = True
    block.step(grads_at(1, mine))
    assert "max_exp_avg_sq" in objs[mine["loc"]].state[mine["loc"]]


@pytest.mark.parametrize("kind", ["dict", "clipped_adam", "nadam_clip"])
def test_learning_rate_set_by_the_user(kind):
    params = make_params(shapes=NAMES)
    theirs, mine = store(params), copy_of(params)
    reference, block = PYRO[kind](), BlockOptimizer.from_user(PYRO[kind](), mine)
    view = OptimView({"all": block})
    for step in range(1, 21):
        set_grads(theirs, grads_at(step, mine))
        reference(list(theirs.values()))
        block.step(grads_at(step, mine))
        if step == 7:
            reference.optim_objs[theirs["loc"]].param_groups[0]["lr"] = 0.3
            view.optim_objs[mine["loc"]].param_groups[0]["lr"] = 0.3
    assert_same(theirs, mine)


def test_scalars_ahead_and_advance():
    """What a recorded chunk of steps does: its scalars beforehand, its count afterwards."""
    one, many = make_params(), make_params()
    rule = ours.ClippedAdam(lr=0.1, lrd=0.9)
    stepwise, chunk = BlockOptimizer.from_user(rule, one), BlockOptimizer.from_user(rule, many)
    groups = chunk.groups()
    for k in range(7):
        stepwise.step(grads_at(k, one))
        for group in groups:
            group.update(chunk.params, grads_at(k, many), chunk.slots, group.scalars(ahead=k))
    chunk.advance(groups, num_steps=7)
    assert_same(one, many)
    assert chunk.state_dict()["param_groups"][0]["lr"] == stepwise.state_dict()["param_groups"][0]["lr"]
    assert chunk.groups() == stepwise.groups()


def test_recorded_block_step_with_clipping():
    eager, recorded = make_params(shapes=NAMES), make_params(shapes=NAMES)
    left = BlockOptimizer.from_user(PYRO["clip_by_module"](), eager)
    right = BlockOptimizer.from_user(PYRO["clip_by_module"](), recorded)
    groups = right.groups()

    def as_tensors():
        return [{k: torch.tensor(v, dtype=torch.float64) for k, v in g.scalars().items()} for g in right.groups()]

    def update(params, grads, slots, scalars):
        for group, numbers in zip(groups, scalars, strict=True):
            group.update(params, grads, slots, numbers)
        return params

    scratch = [copy.deepcopy([p.detach() for p in right.params]), grads_at(1, recorded), copy.deepcopy(right.slots)]
    graph = make_fx(update)(*scratch, as_tensors())
    for step in range(1, 21):
        left.step(grads_at(step, eager))
        graph([p.detach() for p in right.params], grads_at(step, recorded), right.slots, as_tensors())
        right.advance(right.groups())
    assert_same(eager, recorded, bitwise=False)


def test_gradients_are_not_written_even_if_they_share_memory():
    mine = make_params(shapes={"a": (3,), "b": (3,)})
    shared = torch.tensor(4.0, dtype=torch.float64).expand(3)
    block = BlockOptimizer.from_user(pyro.optim.DCTAdam({"clip_norm": 1.0}), mine)
    other = BlockOptimizer.from_user(pyro.optim.ClippedAdam({"clip_norm": 1.0}), copy_of(mine))
    for b in (block, other):
        b.step([shared, shared])
        assert shared.tolist() == [4.0] * 3
        assert not torch.equal(b.params[0], mine["a"].detach().new_zeros(3))


def test_sparse_gradients():
    theirs, mine = make_params(shapes={"e": (4, 2)}), make_params(shapes={"e": (4, 2)})
    sparse = torch.zeros(4, 2, dtype=torch.float64).index_fill_(0, torch.tensor([1, 3]), 1.0).to_sparse(1)
    optimizer, block = torch.optim.Adagrad(theirs.values()), BlockOptimizer.from_user(torch.optim.Adagrad, mine)
    with torch.sparse.check_sparse_tensor_invariants():
        for _ in range(3):
            step_torch(optimizer, theirs, [sparse])
            block.step([sparse])
    assert_same(theirs, mine, bitwise=False)


def test_parameters_that_appear_later():
    params = make_params(shapes=NAMES)
    theirs, mine = store(params), copy_of(params)
    reference = PYRO["name"]()
    first, later = dict(list(mine.items())[:2]), dict(list(mine.items())[2:])
    block = BlockOptimizer.from_user(PYRO["name"](), first)
    for step in range(1, 11):
        if step == 5:
            block.add({**first, **later})
            assert block.names == list(NAMES)
        n = 2 if step < 5 else 4
        grads = grads_at(step, mine)[:n]
        set_grads(dict(list(theirs.items())[:n]), grads)
        reference(list(theirs.values())[:n])
        block.step(grads)
    assert_same(theirs, mine)
    leaf = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    block.add({"loc": leaf})
    assert block.params[3] is leaf
    assert block.state["count"]["loc"] == 0 and len(block.params) == 4


def test_view_over_blocks():
    params = make_params(shapes=NAMES)
    phi, theta = dict(list(params.items())[:2]), dict(list(params.items())[2:])
    user = pyro.optim.Adam({"lr": 0.1})
    blocks = {b: BlockOptimizer.from_user(user, named) for b, named in (("guide", phi), ("model", theta))}
    view = OptimView(blocks, user)
    assert isinstance(view, PyroOptim)
    assert list(map(id, view.optim_objs)) == list(map(id, params.values()))
    assert list(view.get_state()) == list(NAMES)
    before = copy.deepcopy([p.detach() for p in params.values()])
    set_grads(params, grads_at(1, params))
    view(list(phi.values()))
    moved = [not torch.equal(p, b) for p, b in zip(params.values(), before, strict=True)]
    assert moved == [True, True, False, False]
    view.step()
    obj = view.optim_objs[phi["net$$$layer.bias"]]
    assert obj.state[obj.param]["step"] == 1
    assert not hasattr(obj, "optimizer")
    single = torch.optim.Adam([obj.param])
    single.load_state_dict(obj.state_dict())
    assert single.param_groups[0]["lr"] == 0.1
    obj.zero_grad()
    assert obj.param.grad is None


def test_view_works_inside_pyro_svi():
    """Plain `pyro.infer.SVI` calls it like any of Pyro's optimizers."""
    import pyro.distributions as dist

    def model():
        pyro.sample("z", dist.Normal(pyro.param("theta", torch.tensor(1.0)), 1.0))

    def guide():
        pyro.sample("z", dist.Normal(pyro.param("phi", torch.tensor(0.0)), 1.0))

    def run(optim):
        pyro.clear_param_store()
        pyro.set_rng_seed(0)
        model(), guide()
        leaves = {n: pyro.get_param_store()._params[n] for n in ("phi", "theta")}
        optim = OptimView({"all": BlockOptimizer.from_user(optim, leaves)}) if optim is not None else REFERENCE()
        svi = pyro.infer.SVI(model, guide, optim, pyro.infer.Trace_ELBO())
        return [svi.step() for _ in range(10)]

    REFERENCE = lambda: pyro.optim.Adam({"lr": 0.1})  # noqa: E731
    assert run(None) == run(REFERENCE())


def test_users_dictionaries_stay_as_they_are():
    args = {"lr": 0.1, "betas": [0.8, 0.9]}
    clip = {"clip_norm": 1.0}
    plan = {"optimizer": torch.optim.Adam, "optim_args": args, "gamma": 0.5}
    optims = [pyro.optim.Adam(args, clip), pyro.optim.ExponentialLR(dict(plan), clip)]
    for optim in optims:
        kept = vars(optim).keys() - {"optim_objs", "grad_clip", "_state_waiting_to_be_consumed"}
        attributes = {k: copy.copy(vars(optim)[k]) for k in kept}
        mine = make_params()
        block = BlockOptimizer.from_user(optim, mine)
        for step in range(3):
            block.step(grads_at(step, mine))
            block.scheduler_step()
        block.set_state({"weight": block.get_state()["weight"], "unknown": {}})
        assert args == {"lr": 0.1, "betas": [0.8, 0.9]} and clip == {"clip_norm": 1.0}
        assert {k: vars(optim)[k] for k in kept} == attributes


# ------------------------------------------------------------------------------------------------ bad input


class Sealed(PyroOptim):
    def __call__(self, params):
        raise NotImplementedError


def bound():
    return torch.optim.Adam([torch.zeros(1, requires_grad=True)])


REFUSED = {
    "number": (lambda: 0.1, r"got 0\.1 of type float"),
    "name": (lambda: "adam", "got 'adam' of type str"),
    "none": (lambda: None, "got None of type NoneType"),
    "class": (lambda: dict, "got the class dict"),
    "instance": (bound, "got an instance of Adam.*functools.partial"),
    "subclass": (lambda: Sealed(torch.optim.Adam, {}), "got Sealed"),
    "multi": (lambda: pyro.optim.multi.Newton(), "Newton object.*of type Newton"),
    "lbfgs": (lambda: torch.optim.LBFGS, "got LBFGS.*closure"),
    "wrong_arguments": (lambda: pyro.optim.Adam({"learning_rate": 1}), "got TypeError:.*learning_rate"),
    "wrong_value": (
        lambda: functools.partial(torch.optim.Adam, lr=-1.0),
        r"got ValueError: Invalid learning rate: -1\.0",
    ),
    "rule_value": (lambda: ours.Adam(lr=-1.0), r"got ValueError: Invalid learning rate: -1\.0"),
    "clip": (lambda: pyro.optim.Adam({"lr": 1e-3}, {"clip_nrom": 1.0}), "got TypeError:.*clip_nrom"),
    "returns_none": (lambda: lambda ps: None, "got None from"),
    "unfinished": (lambda: pyro.optim.Adam, "got AssertionError"),
    "leaves_out": (lambda: lambda ps: torch.optim.SGD(ps[1:]), r"got an optimizer of \['bias', 'scale'\]"),
    "foreign": (lambda: lambda ps: torch.optim.SGD([*ps, torch.zeros(1)]), r"'scale', None\]"),
    "args_function": (lambda: pyro.optim.Adam(lambda name: 0.1), r"'weight'.*got 0\.1 from"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_no_optimizer_is_refused(kind):
    make, observed = REFUSED[kind]
    with pytest.raises(OptimizerError, match=rf"`optim` cannot(?s:.*){observed}"):
        BlockOptimizer.from_user(make(), make_params())


def test_wrong_number_of_gradients():
    block = BlockOptimizer.from_user(ours.SGD(), make_params())
    with pytest.raises(OptimizerError, match="2 gradients for 3 parameters"):
        block.step([None, None])


def bad_state_dicts():
    params = make_params()
    optimizer = torch.optim.Adam([{"params": [params["weight"]]}, {"params": [params["bias"], params["scale"]]}])
    step_torch(optimizer, params, grads_at(1, params))
    yield optimizer.state_dict(), r"groups of \[1, 2\].*groups of \[3\]"
    other = torch.optim.Adam(reversed(params.values()))
    step_torch(other, params, grads_at(1, params))
    yield other.state_dict(), r"'weight'.*exp_avg of shape \(\).*\(3, 2\)"
    sgd = torch.optim.SGD(params.values(), momentum=0.9)
    step_torch(sgd, params, grads_at(1, params))
    yield sgd.state_dict(), r"\['momentum_buffer'\].*Adam needs 'exp_avg'"


@pytest.mark.parametrize("case", range(3))
def test_state_that_does_not_fit_changes_nothing(case):
    params = make_params()
    block = BlockOptimizer.from_user(ours.Adam(lr=0.1), params)
    block.step(grads_at(1, params))
    before = copy.deepcopy((block.state, block.state_dict()["param_groups"]))
    state_dict, observed = list(bad_state_dicts())[case]
    with pytest.raises(OptimizerError, match=observed):
        block.load_state_dict(state_dict)
    torch.testing.assert_close(
        (block.state, block.state_dict()["param_groups"][0]["lr"]), (before[0], before[1][0]["lr"])
    )


def test_state_of_other_parameters():
    block = BlockOptimizer.from_user(ours.Adam(), make_params())
    other = BlockOptimizer.from_user(ours.Adam(), make_params(shapes={"loc": (2,)}))
    with pytest.raises(OptimizerError, match=r"got the parameters \['loc'\].*has \['bias', 'scale', 'weight'\]"):
        block.load_state(other.state)


@pytest.mark.parametrize("bad", [{}, {"state": {}}, {"optimizer": {"param_groups": []}}])
def test_malformed_state_changes_nothing(bad):
    params = make_params()
    block = BlockOptimizer.from_user(ours.Adam(), params)
    good = block.get_state()["weight"]
    block.step(grads_at(1, params))
    with pytest.raises(
        OptimizerError, match=rf"'scale': got entries \[{', '.join(map(repr, bad.get('optimizer', bad)))}\]"
    ):
        block.set_state({"weight": good, "scale": bad})
    assert block.state["count"]["weight"] == 1


def test_one_block_of_two_dtypes():
    theirs, mine = ({**make_params(), "half": make_params(torch.float32)["bias"]} for _ in range(2))
    optimizer, block = twin_of(ours.Adam(lr=0.1), theirs), BlockOptimizer.from_user(ours.Adam(lr=0.1), mine)
    assert [g.indices for g in block.groups()] == [(0, 1, 2), (3,)]
    for step in range(1, 11):
        step_torch(optimizer, theirs, [*grads_at(step, make_params()), torch.ones(4)])
        block.step([*grads_at(step, make_params()), torch.ones(4)])
    assert_same(theirs, mine)


def test_view_refuses_unknown_tensors():
    view = OptimView({"all": BlockOptimizer.from_user(ours.Adam(), make_params())})
    with pytest.raises(OptimizerError, match=r"shapes \[\(7,\)\]"):
        view([torch.zeros(7)])


def test_own_rule_without_a_twin():
    from dataclasses import dataclass

    @dataclass(frozen=True)
    class SignDescent(ours.Rule):
        lr: float = 0.1
        names = ()

        def numbers(self, count, lr):
            return {"minus_lr": -lr}

        def apply(self, params, grads, slots, scalars):
            torch._foreach_add_(params, torch._foreach_sign(grads), alpha=scalars["minus_lr"])

    params = make_params()
    expected = params["bias"].detach() - 0.5 * grads_at(1, params)[1].sign()
    block = BlockOptimizer.from_user(SignDescent(lr=0.5), params)
    block.step(grads_at(1, params))
    assert torch.equal(params["bias"], expected)
    block.load_state_dict(block.state_dict())
    assert block.groups()[0].count == 2
