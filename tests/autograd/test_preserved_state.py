"""`preserved_state`: what forward passes change is as before, and replays are the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from auxfast import preserved_state


class Stateful(nn.Module):
    """Buffers of every kind: changed in place, replaced, set where there was none, grown, registered, shared."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("missing", None)
        self.register_buffer("cache", torch.zeros(1))
        self.register_buffer("shared", self.norm.running_mean)

    def forward(self, x: Tensor) -> Tensor:
        self.replaced = self.replaced + 1
        self.missing = torch.ones(2)
        self.cache = torch.ones(len(x) + 1)
        if "registered" not in self._buffers:
            self.register_buffer("registered", torch.ones(1))
        self.seen = torch.equal(self.shared, self.norm.running_mean)
        return nn.functional.dropout(self.spectral(self.norm(x)))


KEPT = ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "replaced", "shared")
KEPT += ("spectral.parametrizations.weight.0._u", "spectral.parametrizations.weight.0._v")


@pytest.fixture
def net() -> Stateful:
    torch.manual_seed(0)
    return Stateful()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 3)


class Unchanged:
    """Checks values, identities, and the version counters that graphs made before rely on."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self.values = {name: (b, b.clone(), b._version) for name, b in net.named_buffers(remove_duplicate=False)}
        self.random = torch.get_rng_state()

    def __call__(self, names: tuple[str, ...] = KEPT) -> bool:
        now = dict(self.net.named_buffers(remove_duplicate=False))
        kept = all(
            now[name] is self.values[name][0]
            and torch.equal(now[name], self.values[name][1])
            and now[name]._version == self.values[name][2]
            for name in names
        )
        return kept and torch.equal(torch.get_rng_state(), self.random)


def test_forward_passes_leave_no_trace(net, x):
    unchanged = Unchanged(net)
    with preserved_state():
        net(x)
        first = net.norm.running_mean.clone()
        net(x)
        assert not torch.equal(first, net.norm.running_mean)  # inside they add up, as they would outside
        assert net.seen
        assert not unchanged()
    assert unchanged()
    assert net.missing is None
    assert len(net.cache) == 6  # of another shape: a cache, which other attributes of the module may rely on
    assert net.registered == 1
    net(x)
    assert not unchanged()


def test_values_are_those_without_the_guard(net, x):
    twin = Stateful()
    twin.load_state_dict(net.state_dict(), strict=False)
    state = torch.get_rng_state()
    with preserved_state():
        inside = [net(x), net(x)]
    torch.set_rng_state(state)
    assert all(torch.equal(a, b) for a, b in zip(inside, [twin(x), twin(x)], strict=True))


def test_graphs_made_before_and_inside_stay_valid(net, x):
    def grad(y: Tensor) -> Tensor:
        return torch.autograd.grad(y.square().sum(), net.norm.weight)[0]

    norm = net.norm.eval()
    before, again = norm(x), norm(x)
    with preserved_state():
        inside = norm.train()(x)
        norm(x)
    assert torch.equal(grad(before), grad(again))
    norm(x)
    assert grad(inside).isfinite().all()

    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("mean", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.mean.add_(1)

    mean, w = Mean(), torch.ones(3, requires_grad=True)
    before = mean(w).sum()
    with preserved_state():
        mean(w)
    before.backward()
    assert torch.equal(w.grad, torch.ones(3))


def test_exceptions(net, x):
    batches = (x[:1], torch.randn(5, 2))
    unchanged = Unchanged(net)
    for batch in batches:
        with pytest.raises((ValueError, RuntimeError)), preserved_state():
            net(batch)
        assert unchanged()

    class Interrupted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            net(x)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), preserved_state():
        Interrupted()(x)
    assert unchanged()
    net(x)
    assert not unchanged()


def test_nested_guards(net, x):
    unchanged = Unchanged(net)
    with preserved_state():
        net(x)
        outer = Unchanged(net)
        with preserved_state():
            net(x)
            assert not outer()
        assert outer()
        net(x)
        assert not outer()
    assert unchanged()


def test_a_guard_within_a_forward_pass(net, x):
    class Peeks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Tensor:
            self.net(x)
            with preserved_state():
                self.net(x)
            return self.net(x)

    unchanged, once = Unchanged(net), net.norm.num_batches_tracked.clone()
    with preserved_state():
        Peeks()(x)
        assert net.norm.num_batches_tracked == once + 2
    assert unchanged()


def test_modules_called_by_modules_that_do_not_own_them(net, x):
    class Borrows(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return net(x)

    class Touches(nn.Module):  # without calling the part
        def __init__(self) -> None:
            super().__init__()
            self.part = net

        def forward(self, x: Tensor) -> Tensor:
            self.part.norm.running_mean.add_(1)
            return x

    unchanged = Unchanged(net)
    with preserved_state():
        Borrows()(x)
        Touches()(x)
    assert unchanged()


def test_functional_call(net, x):
    params = dict(net.named_parameters())
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    saved = {name: b.clone() for name, b in buffers.items()}
    unchanged = Unchanged(net)
    with preserved_state():
        for _ in range(2):
            torch.func.functional_call(net, (params, buffers), (x,), tie_weights=False)
            net(x)
    assert unchanged()
    assert all(torch.equal(buffers[name], saved[name]) for name in saved)


def test_transforms_and_inference_mode():
    net, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=0.5)), torch.randn(4, 3)
    unchanged, names = Unchanged(net), ("1.running_mean", "1.running_var")
    net.eval()
    with preserved_state():
        function = lambda w: torch.func.functional_call(net, {"0.weight": w}, (x,)).square().sum()  # noqa: E731
        torch.func.grad(function)(net[0].weight.detach())
        with torch.inference_mode():
            net.train()(x)
        net(x).sum().backward()  # the copies are usable in graphs, wherever they were made
    assert unchanged(names)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")  # of torch's
def test_compiled_modules():
    torch._dynamo.reset()
    net, x = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), torch.randn(4, 3)
    names = ("1.running_mean", "1.running_var")
    compiled = torch.compile(net, backend="aot_eager")
    for _ in range(2):  # compiled within a guard, and before
        unchanged = Unchanged(net)
        with preserved_state():
            compiled(x)
        assert unchanged(names)
        compiled(x)
        assert not unchanged(names)


class Counts(nn.Module):
    """Changes one buffer in place and replaces another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("added", torch.zeros(1))
        self.register_buffer("replaced", torch.zeros(1))
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        self.added.add_(1)
        self.replaced = self.replaced + 1
        return self.norm(x) * self.added * self.replaced


@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, torch.ones(4, 3))])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript(make):
    net, x = nn.Sequential(make(Counts())), torch.randn(4, 3)
    names = ("0.added", "0.replaced", "0.norm.running_mean", "0.norm.num_batches_tracked")
    for _ in range(3):  # TorchScript optimises what runs again
        unchanged = Unchanged(net)
        with preserved_state():
            net(x)
            assert not unchanged(names)
            net(x)
        assert unchanged(names)
        net(x)
        assert not unchanged(names)


def test_lazy_modules_and_buffers_with_gradients_are_left_alone():
    lazy = nn.LazyBatchNorm1d()
    with preserved_state():
        lazy(torch.randn(4, 3))
    assert lazy.running_mean.shape == (3,)

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scale", torch.ones(3, requires_grad=True))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale

    net = Scale()
    with preserved_state():
        net(torch.ones(3)).sum().backward()
    assert torch.equal(net.scale.grad, torch.ones(3))


def test_replays(net, x):
    plain, random = net(x), torch.get_rng_state()
    with preserved_state() as guard:
        first, second = guard.replay(lambda: net(x)), guard.replay(lambda: net(x))
        a, b = first(), second()
        assert not torch.equal(a == 0, b == 0)  # different masks for different functions,
        torch.rand(3)
        for _ in range(2):
            assert torch.equal(first(), a)  # and the same for the same, with the same vectors of spectral norm
            assert torch.equal(second(), b)
    assert torch.equal(torch.get_rng_state(), random)
    assert plain.shape == a.shape


def test_a_function_that_failed_at_first_is_replayed_from_the_call_that_did_not():
    fails = [True, False, False]

    def draw() -> torch.Tensor:
        numbers = torch.randn(3)
        if fails.pop(0):
            raise ValueError
        return numbers

    with preserved_state() as guard:
        replayed = guard.replay(draw)
        with pytest.raises(ValueError):  # noqa: PT011
            replayed()
        assert torch.equal(replayed(), replayed())


@pytest.mark.parametrize(
    "extra", [[], [torch.nn.BatchNorm1d(3)], [torch.nn.Dropout()]], ids=["plain", "buffers", "draws"]
)
def test_modules_are_checked_in_every_call(extra):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), *extra)
    calls = []
    with preserved_state(check=lambda module: calls.append(module)) as guard:
        replayed = guard.replay(lambda: net(torch.ones(2, 3)))
        results = [replayed() for _ in range(3)]
    assert len(calls) == 3 * (2 + len(extra))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("inside", [False, True], ids=["another module", "a new part"])
def test_a_module_that_is_called_in_a_later_call_alone_is_preserved(inside):
    plain, norm = torch.nn.Sequential(torch.nn.Linear(3, 3)), torch.nn.BatchNorm1d(3)
    nets = [plain, plain, norm, plain]
    before = norm.running_mean.clone()

    def call():
        net = nets.pop(0)
        if inside and net is norm:
            plain.append(norm)
            return plain(torch.ones(2, 3))
        return net(torch.ones(2, 3))

    with preserved_state() as guard:
        replayed = guard.replay(call)
        for _ in range(4):
            replayed()
    assert torch.equal(norm.running_mean, before)
    assert norm.num_batches_tracked == 0


def test_a_buffer_that_the_first_call_makes_is_preserved_in_the_next(net):
    class Counter(torch.nn.Module):
        def forward(self, x):
            if not hasattr(self, "count"):
                self.register_buffer("count", torch.zeros(()))
            self.count += 1
            return x * self.count

    counter = Counter()
    with preserved_state() as guard:
        replayed = guard.replay(lambda: counter(torch.ones(())))
        assert [float(replayed()) for _ in range(3)] == [1.0, 2.0, 2.0]
