"""`make gpu-static`: kernels and waits of a GPU, counted without one."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pages import ROOT

from auxfast.solvers import MINRES, Neumann


@pytest.fixture
def gpu(monkeypatch):
    """The modules of benchmarks/gpu."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.gpu import emulation, static

    return SimpleNamespace(emulated=emulation.EmulatedGPU, static=static)


@pytest.mark.slow
def test_the_page_has_the_present_counts(gpu):
    page = gpu.static.PAGE.read_text()
    assert gpu.static.with_tables(page, gpu.static.tables()) == page, "run `make gpu-static`, and see what has changed"


def test_operations_are_launches_and_views_and_allocations_are_none(gpu):
    x, w = torch.ones(4, 3), torch.ones(3, 2, requires_grad=True)
    with gpu.emulated() as counts:
        (x @ w).t().reshape(-1)[1:].sum().backward()
        torch.empty_like(x).add_(x.view(2, 6).view(4, 3))
    # reshape copies; the sum's gradient is an expanded 1, which the rest of it turns into a tensor
    assert counts.launches["aten.mm"] == 2
    assert counts.launches["aten.add_"] == 1
    assert not {"aten.view", "aten.empty_like", "aten.t", "aten.expand", "aten.slice"} & set(counts.launches)
    assert not counts.waits


def test_tensors_say_where_they_are_and_the_host_launches_nothing(gpu):
    x = torch.ones(3)
    with gpu.emulated() as counts:
        on_host = torch.zeros(3) + torch.from_numpy(np.ones(3))
        assert (x.device.type, x.is_cpu, on_host.device.type, on_host.is_cpu) == ("cuda", False, "cpu", True)
        assert torch.zeros(3, device=x.device).is_cuda
        assert x.new_zeros(3).is_cuda
        assert on_host.numpy().sum() == 3
    assert dict(counts.launches) == {"aten.zeros": 1, "aten.new_zeros": 1}
    assert not counts.waits
    assert x.is_cpu


def test_what_the_host_waits_for_is_counted(gpu):
    x = torch.arange(3.0)
    with gpu.emulated() as counts:
        assert x.sum().item() == 3
        assert bool(x.any())
        assert x.tolist() == [0, 1, 2]
        assert x.cpu().numpy().sum() == 3
        assert torch.from_numpy(np.ones(3)).to(x.device).is_cuda
        assert torch.tensor([1.0], device=x.device).is_cuda
        assert len(x[x > 0]) == 2
    assert counts.waits == {
        "_local_scalar_dense": 2,
        "tolist": 1,
        "copy to the host": 1,
        "copy to the device": 2,
        "index": 1,
    }


def test_what_a_gpu_refuses_is_refused(gpu):
    x = torch.ones(3)
    with gpu.emulated(), pytest.raises(RuntimeError, match="on the GPU and on the host"):
        x + torch.ones(3)
    with gpu.emulated(), pytest.raises(TypeError, match="call cpu"):
        x.numpy()


@pytest.mark.parametrize("solver", [Neumann(20, 0.01), MINRES(20, tol=None)], ids=["Neumann", "MINRES"])
def test_solvers_look_at_their_numbers_once_in_eight_steps(gpu, solver):
    diagonal, rhs = torch.linspace(1, 100, 5000), [torch.ones(5000)]

    def waits(steps):
        with gpu.emulated() as counts:
            _, stats = replace(solver, steps=steps).solve(lambda v: [v[0] * diagonal], rhs)
        assert stats.iterations == steps
        return counts.waits.total()

    assert waits(20) - waits(4) == 2
