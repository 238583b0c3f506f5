"""`preserved_state` beside other threads: they keep their buffers, and no number is drawn twice without a word."""

from __future__ import annotations

import subprocess
import sys
import threading
import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

import auxfast
from auxfast import preserved_state

SOLVER = auxfast.solvers.MINRES(steps=4, tol=None)
ELSEWHERE = "while another thread that may use torch was running"


class Other(threading.Thread):
    """A thread that does what it is asked for while the one that asks waits."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.asked, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.job: Callable[[], object] | None = None
        self.results: list[object] = []

    def run(self) -> None:
        while self.asked.acquire() and self.job is not None:
            self.results.append(self.job())
            self.done.release()

    def do(self, job: Callable[[], object] | None) -> None:
        self.job = job
        self.asked.release()
        if job is not None:
            self.done.acquire()


@pytest.fixture
def other() -> Iterator[Other]:
    thread = Other()
    thread.start()
    yield thread
    thread.do(None)
    thread.join()


def hypergradient(inner: Callable[[Tensor], Tensor], count: int = 1, **options: bool) -> Tensor:
    w, decay = torch.ones(4, requires_grad=True), torch.ones(1, requires_grad=True)
    losses = [lambda: inner(w) + (decay * w**2).sum()] * count
    return auxfast.hypergradient(lambda: w.sum(), losses, [w], [decay], **options).grads[0]


def test_another_thread_trains_its_own_network(other):
    norm, x = nn.BatchNorm1d(2), torch.ones(4, 2)

    def inner(w: Tensor) -> Tensor:
        other.do(lambda: norm(x))
        return w.sum()

    hypergradient(inner)
    assert norm.num_batches_tracked == 1
    assert norm.running_mean.any()


@pytest.mark.parametrize("count", [1, 3])
def test_numbers_of_another_thread_are_not_drawn_again_and_it_is_said(other, count):
    def inner(w: Tensor) -> Tensor:
        if len(other.results) < 1:
            other.do(lambda: torch.rand(2).tolist())
        return w.sum()

    with pytest.warns(RuntimeWarning, match=ELSEWHERE):
        hypergradient(inner, count)
    drawn = [*other.results[0], *torch.rand(2).tolist()]
    assert len({*drawn}) == 4


def test_numbers_of_another_thread_are_not_drawn_again_where_the_guard_draws_too(other):
    def draws():
        with preserved_state():
            nn.functional.dropout(torch.ones(3))
            other.do(lambda: torch.rand(2).tolist())

    with pytest.warns(RuntimeWarning, match=ELSEWHERE):
        draws()
    drawn = [*other.results[0], *torch.rand(2).tolist()]
    assert len({*drawn}) == 4


def test_functions_that_draw_nothing_leave_the_generator_to_others(other):
    calls = []

    def inner(w: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 3:
            other.do(lambda: torch.rand(1).item())
        return w.square().sum()

    with pytest.warns(RuntimeWarning, match=ELSEWHERE):
        hypergradient(inner, 3)
    assert len({*other.results}) == len(other.results) > 3


def test_the_warning_can_be_turned_off(other):
    def inner(w: Tensor) -> Tensor:
        other.do(lambda: torch.rand(1))
        return w.sum()

    hypergradient(inner, warn=False)
    with preserved_state(warn=False):
        other.do(lambda: torch.rand(1))


@contextmanager
def busy_without_torch() -> Iterator[None]:
    stop = threading.Event()
    options = {"stmt": "while not stop.is_set(): pass", "globals": {"stop": stop}, "number": 1}
    thread = threading.Thread(target=timeit.timeit, kwargs=options)
    thread.start()
    yield
    stop.set()
    thread.join()


def test_threads_that_wait_or_know_nothing_of_torch_do_not_count(other):
    other.do(lambda: torch.rand(1))
    random = torch.get_rng_state()
    with preserved_state():
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), random)
    with busy_without_torch(), preserved_state():
        torch.rand(3)
    assert torch.equal(torch.get_rng_state(), random)


class Yields(nn.Module):
    """Lets other threads run in the middle of a forward pass."""

    def forward(self, x: Tensor) -> Tensor:
        threading.Event().wait(1e-4)
        return x


@contextmanager
def frequent_switches() -> Iterator[None]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_many_threads_compute_hypergradients_of_their_own_networks(dropout):
    class Problem:
        def __init__(self, seed: int) -> None:
            torch.manual_seed(seed)
            spectral = nn.utils.parametrizations.spectral_norm(nn.Linear(3, 1))
            self.net = nn.Sequential(nn.Linear(3, 3), Yields(), nn.BatchNorm1d(3), nn.Dropout(dropout), spectral)
            self.x, self.phi = torch.randn(8, 3), torch.zeros(8, requires_grad=True)
            self.buffers = [(name, b, b.clone(), b._version) for name, b in self.net.named_buffers()]

        def inner(self) -> Tensor:
            decay = sum(p.square().sum() for p in self.net.parameters())
            return (self.phi.exp() * self.net(self.x)[:, 0].square()).mean() + 0.1 * decay

        def hypergradient(self) -> Tensor:
            losses = (lambda: self.net(self.x).square().mean()), [self.inner, self.inner]
            return auxfast.hypergradient(*losses, self.net.parameters(), [self.phi], solver=SOLVER, warn=False).grads[0]

        def run(self) -> None:
            for _ in range(4):
                self.result = self.hypergradient()
                with pytest.raises(RuntimeError), preserved_state(warn=False):
                    self.net(self.x[:, :2])

    problems = [Problem(seed) for seed in range(6)]
    alone = [problem.hypergradient() for problem in problems]
    threads = [threading.Thread(target=problem.run) for problem in problems]
    with frequent_switches():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for problem, expected in zip(problems, alone, strict=True):
        now = dict(problem.net.named_buffers())
        for name, buffer, value, version in problem.buffers:
            assert now[name] is buffer
            assert torch.equal(buffer, value)
            assert buffer._version == version
        assert dropout or torch.equal(problem.result, expected)
    assert not nn_module._global_forward_hooks
    assert not nn_module._global_forward_pre_hooks


@pytest.mark.parametrize("first_in_is_first_out", [True, False])
def test_a_network_of_two_threads_has_its_buffers_back(other, first_in_is_first_out):
    net, x, inside = nn.BatchNorm1d(2), torch.ones(4, 2), preserved_state()
    buffers = {name: (b, b.clone()) for name, b in net.named_buffers()}
    outside = preserved_state()
    outside.__enter__()
    net(x)
    other.do(inside.__enter__)
    other.do(lambda: net(x))
    if first_in_is_first_out:
        outside.__exit__()
        other.do(inside.__exit__)
    else:
        other.do(inside.__exit__)
        outside.__exit__()
    for name, buffer in net.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])


IN_A_THREAD_OF_AUTOGRAD = """
import os, threading, torch
from torch import nn
import auxfast

net, here, there = nn.BatchNorm1d(2), threading.get_ident(), []

class Deep(torch.autograd.Function):  # the engine goes on in another thread where backward passes are nested deeply
    @staticmethod
    def forward(ctx, x, depth):
        ctx.depth = depth
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.depth:
            with torch.enable_grad():
                Deep.apply(torch.ones(1, requires_grad=True), ctx.depth - 1).sum().backward()
        else:
            net(torch.ones(4, 2))
            there.append(threading.get_ident())
        return grad, None

def backward():
    Deep.apply(torch.ones(1, requires_grad=True), 70).sum().backward()

with auxfast.preserved_state() as guard:
    guard.replay(lambda: net(torch.ones(4, 2)))()  # a forward pass, that the backward pass computes again
    backward()
assert there != [here]
assert net.num_batches_tracked == 0
backward()
assert net.num_batches_tracked == 1

entered, leave = threading.Event(), threading.Event()
def guard():
    with auxfast.preserved_state():
        entered.set()
        leave.wait()
thread = threading.Thread(target=guard)
thread.start()
entered.wait()
backward()
leave.set()
thread.join()
assert net.num_batches_tracked == 2
print("right", flush=True)
os._exit(0)  # torch ends the threads of its engine badly
"""


def test_a_thread_of_autograd_has_the_guard_of_the_forward_pass_that_it_computes_again():
    done = subprocess.run([sys.executable, "-c", IN_A_THREAD_OF_AUTOGRAD], capture_output=True, text=True)
    assert done.stdout == "right\n", done.stderr
