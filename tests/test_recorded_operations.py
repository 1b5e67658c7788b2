r"""What a recorded step runs: fewer operations for the same bits, and nothing that was a tensor of its own less."""

from __future__ import annotations

import gc
import operator
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from pyro_emvae.engine.simplify import simplified
from pyro_emvae.engine.tape import QUICK, function_of, taped
from pyro_emvae.engine.trace import trace

aten = torch.ops.aten


class Seen(TorchDispatchMode):
    """Notes the operations that are dispatched."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def recorded(step: Callable, *inputs: Tensor) -> tuple[Callable, list[str]]:
    """Return a step as it is run when recorded, and the names of its operations."""
    with torch.no_grad():
        traced = simplified(trace(lambda *xs: tuple(step(*xs)), tuple(x.clone() for x in inputs), places=True))
    names = [str(node.target).replace("aten.", "") for node in traced.graph.nodes if node.op == "call_function"]
    return function_of(traced), names


def bits(x: Tensor) -> bytes:
    return x.contiguous().numpy().tobytes()


def assert_same(step: Callable, *inputs: Tensor, runs: int = 2) -> list[str]:
    """Compare results and inputs of eager and recorded runs to the bit, strides and generator included."""
    run, names = recorded(step, *inputs)
    eager, mine = [x.clone() for x in inputs], [x.clone() for x in inputs]
    for _ in range(runs):
        state = torch.get_rng_state()
        with torch.no_grad():
            expected = (*step(*eager), *eager, torch.get_rng_state())
            torch.set_rng_state(state)
            found = (*run(*mine), *mine, torch.get_rng_state())
        for x, y in zip(expected, found, strict=True):
            assert (x.shape, x.stride(), x.dtype, bits(x)) == (y.shape, y.stride(), y.dtype, bits(y))
    return names


X = torch.tensor([[0.5, -0.0, 3.0], [-2.0, 1e-3, float("nan")]])

FEWER = {
    "detach": (lambda x: [x.exp().detach().detach() + 1], ["exp.default", "add.Tensor"]),
    "view of the same shape": (lambda x: [x.exp().view(2, -1) + 1], ["exp.default", "add.Tensor"]),
    "expansion to the same shape": (lambda x: [x.exp().expand(2, 3) + 1], ["exp.default", "add.Tensor"]),
    "transpose of a transpose": (lambda x: [x.t().t().exp()], ["exp.default"]),
    "view and back": (lambda x: [x.view(6).view(2, 3).exp()], ["exp.default"]),
    "view twice": (lambda x: [x.t().exp() + x.t()], ["t.default", "exp.default", "add.Tensor"]),
    "twice": (lambda x: [x.exp() + x.exp()], ["exp.default", "add.Tensor"]),
    "twice, after twice": (lambda x: [(x + 1).exp() * (x + 1).exp()], ["add.Tensor", "exp.default", "mul.Tensor"]),
    "several results": (
        lambda x: [x.max(1)[0] + x.max(1)[0]],
        ["max.dim", "<built-in function getitem>", "add.Tensor"],
    ),
    "minus minus": (lambda x: [x.neg().neg().exp()], ["exp.default"]),
    "first power": (lambda x: [x.pow(1.0).exp()], ["exp.default"]),
    "times one": (lambda x: [(1 * x * 1.0).exp() / 1], ["exp.default"]),
    "times ones": (lambda x: [(torch.ones(2, 3) * x).exp()], ["exp.default"]),
    "times ones of its shape": (lambda x: [torch.ones_like(x.exp()) * x.exp()], ["exp.default"]),
    "zeros of its type": (lambda x: [torch.where(x > 0, x, x.new_zeros([]))], ["gt.Scalar", "where.self"]),
    "one number twice": (
        lambda x: [x.exp() * torch.tensor(2.0) + x.exp() * torch.tensor(2.0)],
        ["exp.default", "mul.Tensor", "add.Tensor"],
    ),
    "sum and view": (lambda x: [x.sum([0], True).view(3) + 1], ["sum.dim_IntList", "add.Tensor"]),
    "expansions": (lambda x: [x.expand(4, 2, 3).expand(5, 4, 2, 3).exp()], ["expand.default", "exp.default"]),
    "a view of the second": (lambda x: [x.exp() + x.exp().detach()], ["exp.default", "add.Tensor"]),
    "a result that was a view": (lambda x: [x.exp().detach()], ["exp.default"]),
}


@pytest.mark.parametrize("case", FEWER)
def test_what_changes_no_bit_is_left_out(case):
    step, expected = FEWER[case]
    assert assert_same(step, X) == expected


OTHERS = {
    "numbers of another type": (lambda x: [x.pow(2) + x.pow(2.0) + x.pow(True)], 5),
    "zeros of another sign": (lambda x: [x.add(0.0).add(x.add(-0.0))], 3),
    "plus zero": (lambda x: [x + 0], 1),
    "times minus one": (lambda x: [x * -1], 1),
    "power of integers": (lambda x: [(x > 0).long().pow(1.0) + 1], 4),
    "times one in another type": (lambda x: [x * torch.ones(2, 3, dtype=torch.float64) + 1], 2),
    "times ones of more rows": (lambda x: [(x * torch.ones(4, 2, 3)).exp()], 2),
    "another stride": (lambda x: [x.t().mul(1).view(3, 2) if x.dim() > 9 else x.expand(2, 2, 3).pow(1.0)], 2),
    "complex numbers times one": (lambda x: [(torch.complex(x, 1 / x) * 1).abs() + 1], 5),
    "the only one of several": (lambda x: [x[:1].exp().unbind()[0] + 1], 5),
    "a sum without its dims": (lambda x: [x[:, :1].sum([0]).view(()) + 1], 4),
    "what was not written": (lambda x: [torch.cat([torch.empty(0), torch.empty(0), x.view(6)])], 4),
    "large zeros": (lambda x: [x.expand(5000, 2, 3).exp() + torch.zeros_like(x.repeat(5000, 1, 1))], 5),
    "a sum of other dims": (lambda x: [x.view(1, 2, 3).sum([1], True).view(3, 1)], 3),
    "a sum used twice": (lambda x: (lambda s: [s.view(3) + 1, s * x])(x.sum([0], True)), 4),
    "an expansion to one": (lambda x: [x[:1].expand(1, 1, 3).expand(1, 2, 3) + 1], 4),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_only_looks_alike_stays(case):
    step, count = OTHERS[case]
    assert len(assert_same(step, X)) == count


def test_random_operations_are_not_merged():
    def step(x):
        p = x.sigmoid().nan_to_num()
        return [torch.bernoulli(p) - torch.bernoulli(p), torch.rand(3) - torch.rand(3), torch.rand_like(x)]

    names = assert_same(step, X)
    assert [names.count(name) for name in ("bernoulli.default", "rand.default", "rand_like.default")] == [2, 2, 1]


def test_random_operations_that_nobody_uses_stay():
    assert assert_same(lambda x: (torch.rand(3), [x.exp()])[1], X) == ["rand.default", "exp.default"]


def _written_in_between(write: Callable) -> Callable:
    def step(x, f):
        before = f(x)
        write(x)
        return [before + 0.25, f(x) + 0.5]

    return step


WRITES = {
    "itself": lambda x: x.add_(1),
    "a view": lambda x: x.view(6)[2:].mul_(3),
    "a view of a view": lambda x: x.t()[1].view(2).zero_(),
    "an out argument": lambda x: torch.exp(x.clone(), out=x),
    "many at once": lambda x: torch._foreach_add_([x], 1.0),
    "by index": lambda x: x.__setitem__((slice(None), torch.tensor([0, 2])), 7.0),
}
READS = {
    "exp": torch.exp,
    "view": lambda x: x.view(6) * 2,
    "transpose": lambda x: x.t().exp(),
    "times one": lambda x: x * 1,
    "minus minus": lambda x: x.neg().neg(),
    "several results": lambda x: x.max(1)[0],
    "part": lambda x: x[1].exp(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("read", READS)
def test_what_is_read_before_and_after_a_write_is_read_twice(read, write):
    step = _written_in_between(WRITES[write])
    assert_same(lambda x: step(x, READS[read]), X)
    assert_same(lambda x: step(x.clone(), READS[read]), X)


MADE = {
    "the second": lambda a, b, x: b.add_(1),
    "the first": lambda a, b, x: a.add_(1),
    "a view of the second": lambda a, b, x: b.view(-1)[:2].add_(1),
    "a view of the first": lambda a, b, x: a.detach().view(-1)[:2].add_(1),
    "the argument": lambda a, b, x: x.add_(1),
}


@pytest.mark.parametrize("write", MADE)
@pytest.mark.parametrize("read", READS)
def test_what_is_written_stays_a_tensor_of_its_own(read, write):
    def step(x):
        x = x.clone()
        a, b = READS[read](x).contiguous(), READS[read](x).contiguous()
        MADE[write](a, b, x)
        return [a + 0.25, b + 0.5, x + 1]

    assert_same(step, X)


def test_minus_minus_of_what_was_written_in_between():
    def step(x):
        minus = -x
        x.add_(1)
        return [(-minus).exp()]

    assert_same(step, X)


def test_values_of_a_sparse_tensor_that_are_written_in_between():
    def step(x):
        sparse = torch.sparse_coo_tensor(torch.tensor([[0, 3]]), x.clone(), (4, 3), check_invariants=False)
        before = sparse.to_dense() + 1
        sparse._values().add_(1)
        return [before, sparse.to_dense() + 1]

    assert_same(step, X)


def test_what_is_drawn_in_place_is_read_from_the_draw():
    """So that whoever gives each of many runs a tensor of its own to draw into finds what depends on it."""

    def step(x):
        before = torch.empty(2, 3)
        return (before.normal_().view(2, 3) * x,)

    traced = simplified(trace(step, (X,), places=True))
    draw, product = [node for node in traced.graph.nodes if node.op == "call_function"][1:]
    assert draw.target is aten.normal_.default
    assert product.args[0] is draw


def test_a_constant_that_is_written_is_made_anew():
    assert_same(lambda x: [torch.zeros(3).add_(x[0]), torch.zeros(3) + x[0], torch.ones_like(x).add_(x)], X)


def test_what_changes_its_shape_in_place_is_left_as_it_is():
    def step(x):
        a = x.view(2, 3)
        before = a.t().exp()
        a.t_()
        return [before, a.exp(), x.view(2, 3).exp()]

    assert_same(step, X)


@pytest.mark.parametrize("again", [False, True])
def test_batch_norm_moves_its_averages_each_time(again):
    """Its schema does not say that it writes."""

    def step(x, mean, variance):
        first = nn.functional.batch_norm(x, mean, variance, training=True)
        second = nn.functional.batch_norm(x, mean, variance, training=True)
        return [first + second if again else x + 1, mean * 1]

    names = assert_same(step, torch.randn(4, 3), torch.zeros(3), torch.ones(3))
    assert names.count("native_batch_norm.default") == 2


RESULTS = {
    "twice": lambda x: [x.exp(), x.exp()],
    "one and its view": lambda x: (lambda y: [y.detach(), y.detach(), y.view(2, 3)])(x.exp()),
    "an input": lambda x: [x.detach(), x.t().t(), x * 1, x.view(2, 3)],
    "a constant": lambda x: [torch.ones(3), torch.ones(3) * 2, torch.zeros_like(x), torch.tensor(2.0).exp()],
    "a constant that is used": lambda x: (lambda c: [c.detach(), x[0] * c, c * 1])(torch.full((3,), 3.0)),
    "a number": lambda x: [torch.tensor(2.0) * x, torch.tensor(2.0) * torch.ones([])],
    "a constant that was made before": lambda x: [x[0] * torch.full((3,), 3.0), torch.full((3,), 3.0).view(3, 1)],
    "an input times one": lambda x: [x * 1],
    "a view of an input times one": lambda x: [x.t() * 1],
    "an input and its view": lambda x: [x.exp(), x.t().t()],
    "three times": lambda x: [x.exp() + 1, x.exp(), x.exp().view(6)],
    "a part": lambda x: [x.max(1)[0], x.max(1)[0], x.max(1)[1]],
    "a factor of one": lambda x: (lambda y: [y, y * 1, y / 1, y.neg().neg()])(x.exp()),
    "an early and a late one": lambda x: (lambda y: [x.exp(), y])((x.exp() * 2) / 1),
}


@pytest.mark.parametrize("case", RESULTS)
def test_results_stay_tensors_of_their_own(case):
    """Who gets the results may write into them: whatever that changes is what it changes in an eager run."""
    step = RESULTS[case]
    run, _ = recorded(step, X)
    for place in range(len(step(X))):
        inputs = X.clone(), X.clone()
        outcomes = []
        for function, x in zip((step, run), inputs, strict=True):
            with torch.no_grad():
                results = function(x)
                assert len({id(result) for result in (*results, x)}) == len(results) + 1
                results[place].add_(1)
                outcomes.append([*map(bits, (*results, x, *function(x)))])
        assert outcomes[0] == outcomes[1]


def test_minus_minus_of_what_was_written_through_a_view():
    def step(x: Tensor):
        y = -x
        y[0] = 0.0
        return (2 * (-y),)

    assert_same(step, torch.arange(1.0, 4.0))


def written_into(step: Callable, *inputs: Tensor) -> None:
    """Assert that a recorded run is as the first one after somebody wrote into the first one's results."""
    run, _ = recorded(step, *inputs)
    given = [x.clone() for x in inputs]
    first = [x.clone() for x in run(*given)]
    for x in run(*given):
        (x._values() if x.is_sparse else x).mul_(0.5)
    for x, y in zip([*given, *run(*given)], [*inputs, *first], strict=True):
        torch.testing.assert_close(x.to_dense(), y.to_dense(), rtol=0, atol=0)


def sparse(values: Tensor) -> Tensor:
    return torch.sparse_coo_tensor(torch.tensor([[0, 2]]), values, (3,), check_invariants=False)


INTO = {
    "a view of what became the input": lambda x: [(x / 1.0).t() * 1.0],
    "the values of a sparse result that are the input": lambda x: [sparse((x.flatten()[:2] / 1.0) * 1.0)],
    "the values of a sparse result that are a constant": lambda x: [sparse(torch.ones(2) * 2.0), x + 1.0],
    "a part of a folded result": lambda x: [
        torch.tensor(1.0) * torch.stack([torch.ones(2), torch.ones(2)]).unbind(0)[0]
    ],
}


@pytest.mark.parametrize("step", INTO.values(), ids=INTO)
def test_who_writes_into_results_changes_no_later_run(step):
    written_into(step, torch.arange(6.0).reshape(2, 3))


def test_an_assertion_stays():
    def step(x: Tensor):
        torch._assert_async((x > 0).all())
        return (x + 1,)

    run, names = recorded(step, torch.ones(2))
    assert "_assert_async.default" in names
    with pytest.raises(RuntimeError):
        run(-torch.ones(2))


def test_a_result_that_is_given_twice_stays_one():
    run, _ = recorded(lambda x: (lambda y: [y, y])(x.exp()), X)
    one, two = run(X)
    assert one is two


def test_an_input_that_is_part_of_a_tensor_from_outside_by_chance():
    outside = torch.arange(6.0)

    def step(x):
        return [x.detach().exp() + outside[:2].exp(), outside[:2] + x.view(2)]

    with torch.no_grad():
        run = function_of(simplified(trace(lambda x: tuple(step(x)), (outside[:2],), places=True)))
        for x in (outside[:2], outside[2:4]):
            assert [*map(bits, run(x))] == [*map(bits, step(x))]
        outside.add_(1)
        assert [*map(bits, run(outside[3:5]))] == [*map(bits, step(outside[3:5]))]


def test_inputs_that_share_their_memory_by_chance():
    x = torch.arange(4.0)

    def step(x, y):
        return [x.detach().exp() - y.detach().exp(), x.view(2, 2) + y.view(2, 2)]

    with torch.no_grad():
        run = function_of(simplified(trace(lambda *xs: tuple(step(*xs)), (x, x.detach()), places=True)))
        assert [*map(bits, run(x, x + 1))] == [*map(bits, step(x, x + 1))]


def test_a_tensor_is_let_go_after_its_last_use():
    class Alive(TorchDispatchMode):
        most, made = 0, []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            self.made.append(weakref.ref(out))
            self.most = max(self.most, sum(ref() is not None for ref in self.made))
            return out

    def step(x):
        for _ in range(20):
            x = (x + 1).exp().detach()
        return (x,)

    for run in (recorded(step, X)[0], taped(step, (X.clone(),))):
        with Alive() as alive:
            run(X.clone())
        assert len(alive.made) >= 40
        assert alive.most <= 3


def test_constants_go_with_the_function():
    """No cycle keeps them until the collector runs."""
    outside = [torch.rand(3)]
    known = weakref.ref(outside[0])
    run = function_of(trace(lambda x: (x + outside[0],), (X,)))
    outside.clear()
    gc.collect()
    gc.disable()
    try:
        assert run(X)[0].shape == X.shape
        assert known() is not None
        del run
        assert known() is None
    finally:
        gc.enable()


def every_binding(x: Tensor) -> list[Tensor]:
    """Use each operation that has a binding of torch's own, in the ways in which gradients use them."""
    y, square, index = x + 1, torch.mm(x, x.t()), torch.tensor([0, 1])
    return [
        *(torch.add(x, y, alpha=2), x - 1, torch.sub(x, y, alpha=3), x * 2.5, x * y, x * True, y / 3, y / x),
        *(x.neg(), x.exp(), y.log(), x.log1p(), x.sigmoid(), x.tanh(), y.sqrt(), x.pow(2), y.pow(0.5), x.pow(-1)),
        *(x.clamp(0.1), x.clamp(max=0.5), torch.clamp(x, 0.1, float("inf")), x.repeat(2, 1, 1), x.permute(1, 0)),
        *(x.sum(), x.sum(-1), x.sum([0, 1]), x.sum((0,), True), x.sum(0, dtype=torch.float64), x.logsumexp((0,), True)),
        *(x.sum(dtype=torch.float64), x.logsumexp(-1), x.view(-1), x.view(3, 2), x.view(1, 2, 3), x[0, :1].view(())),
        *(x.select(1, 2), x.unsqueeze(-1), x.unsqueeze(0).squeeze(0), x.t(), x.transpose(-1, 0), x.detach()),
        *(x.expand(4, 2, 3), x[0].expand(-1), torch.expand_copy(x[0], [2, -1]), torch.ones(()).expand(())),
        *(torch.addmm(x, square, x), torch.addmm(x[0], square, x, beta=2, alpha=0.5), torch.dot(x[0], x[1])),
        *(torch.bmm(x.expand(2, 2, 3), x.t().expand(2, 3, 2)), x.index_select(0, index), x.gather(1, index.view(2, 1))),
        *(torch.stack([x, y]), torch.stack((x, y), -1), torch.cat([x, y], 1), torch.cat((x, y))),
        *(*x.unbind(), *x.unbind(1), *x.split(2, -1), *torch.split(x, 1)),
        *(torch.rsub(x, 1), 2 - x, 1 / x, torch.mul(2, x)),
        nn.functional.binary_cross_entropy_with_logits(x, y, reduction="none"),
        nn.functional.binary_cross_entropy_with_logits(x, y, x, pos_weight=y),
    ]


def test_each_binding_is_the_recorded_operation():
    x = torch.rand(2, 3)
    traced = trace(lambda x: tuple(every_binding(x)), (x,))
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    operations = [target for target in calls if target is not operator.getitem]
    assert set(QUICK) <= set(operations)
    run = function_of(traced)
    with torch.no_grad(), Seen() as seen:
        found = run(x)
    assert seen.seen == operations
    assert [*map(bits, found)] == [*map(bits, every_binding(x))]


def odd_operations(x: Tensor) -> list[Tensor]:
    """Use operations with results in their arguments, of other layouts and types, and with names."""
    out, place = torch.empty(2, 3), torch.zeros(4, 3)
    torch.add(x, x, alpha=2, out=out)
    place.index_put_((torch.tensor([0, 2]),), x, accumulate=True)
    sparse = torch.sparse_coo_tensor(torch.tensor([[0, 3]]), x, (4, 3), check_invariants=False)
    return [
        *(out, place, sparse.to_dense(), sparse.mul(2).to_dense(), sparse.add(sparse).to_dense()),
        *(x.to(torch.float64), x.double().to(torch.float32, copy=True), torch.mul(x, 2, out=torch.empty(2, 3))),
        *(torch.full_like(x, float("nan")), torch.full((2,), float("-inf")), x[None, :, torch.tensor([1, 0])]),
        *(torch.where(x > 0.5, 1.0, x), torch.tensor(True) & (x > 0.5), x.to(memory_format=torch.contiguous_format)),
    ]


@pytest.mark.parametrize("quick", [False, True])
def test_operations_with_results_in_their_arguments_and_of_other_layouts(quick):
    x = torch.rand(2, 3)
    run = taped(odd_operations, (x,)) if quick else recorded(odd_operations, x)[0]
    with torch.no_grad():
        assert [*map(bits, run(x))] == [*map(bits, odd_operations(x))]


def test_modes_see_what_a_recorded_step_does():
    class Double(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            name = getattr(func, "__name__", "")
            return func(*args, **(kwargs or {})) * (2 if name.split(".")[0] in ("exp", "tanh_backward") else 1)

    run, _ = recorded(lambda x: [x.exp(), torch.ops.aten.tanh_backward(x, x)], X)
    plain = run(X)
    with Double():
        doubled = run(X)
    assert all(torch.equal(2 * x.nan_to_num(), y.nan_to_num()) for x, y in zip(plain, doubled, strict=True))
