"""Tensors on several devices: errors that name them, and a GPU that is not the current one."""

from __future__ import annotations

import pytest
import torch
from ops.combiner_cases import SMALL, inputs
from ops.test_neumann import STEP, beginning, lists

from auxfast import hypergradient
from auxfast.ops.combiner import combiner
from auxfast.ops.neumann import NeumannSteps, neumann_guarded_step_
from auxfast.solvers import Identity

from .cases import CASES, Case

pytestmark = pytest.mark.cuda
OPS = torch.ops.auxfast


@pytest.mark.parametrize("on_cpu", ["losses", "phi", "mask"])
def test_combiner_names_the_devices(on_cpu):
    losses, phi, *_ = inputs(SMALL, 5, device="cuda")
    given = {"losses": losses, "phi": phi, "mask": losses > 1}
    given[on_cpu] = given[on_cpu].cpu()
    mask = given["mask"] if on_cpu == "mask" else None
    with pytest.raises(RuntimeError, match=r"losses are on \S+ and (phi|mask) is on \S+: move one"):
        combiner(given["losses"], given["phi"], SMALL, mask)


@pytest.mark.parametrize("on_cpu", ["tangents", "grad", "losses", "phi", "saved"])
def test_raw_combiner_ops_refuse_other_devices(on_cpu):
    losses, phi, grad, tangents = inputs(SMALL, 5, device="cuda")
    _, _, saved = OPS.combiner_forward(losses, phi, SMALL.packed, True)
    given = {"tangents": tangents, "grad": grad, "losses": losses, "phi": phi, "saved": saved}
    given[on_cpu] = given[on_cpu].cpu()
    what = "phi" if on_cpu == "losses" else on_cpu
    with pytest.raises(RuntimeError, match=f"{what} and losses must be on one device"):
        OPS.combiner_second_order(*given.values(), SMALL.packed)


def test_neumann_step_refuses_other_devices():
    start, hv = lists([(3,), (4,)], torch.float32, "cuda", 2)
    steps = NeumannSteps(start, STEP)
    hv[1] = hv[1].cpu()
    with pytest.raises(RuntimeError, match=r"hv\[1\] and v must be on one device"):
        steps.step(hv)


@pytest.mark.parametrize("name", ["v", "v_before", "hv", "p"])
def test_guarded_neumann_step_refuses_other_devices(name):
    given = dict(zip(("v", "v_before", "hv", "p"), lists([(3,), (4,)], torch.float32, "cuda", 4), strict=True))
    given[name][1] = given[name][1].cpu()
    with pytest.raises(RuntimeError, match=rf"{name}\[1\] and v\[0\] must be on one device"):
        neumann_guarded_step_(*given.values(), beginning("cuda"), STEP)


def test_hypergradient_refuses_inner_parameters_on_two_devices():
    inner = [torch.ones(2, device=device, requires_grad=True) for device in ("cpu", "cuda")]
    phi = torch.ones(2, requires_grad=True)
    loss = ((inner[0] + inner[1].cpu()).square() * phi).sum()
    with pytest.raises(ValueError, match="inner_params must be of one device, not of cpu and cuda:0"):
        hypergradient(loss, loss, inner, [phi], solver=Identity())


@pytest.fixture
def second_gpu() -> str:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs a second GPU")
    return "cuda:1"


@pytest.mark.parametrize("side_stream", [False, True])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_gpu_that_is_not_the_current_one(case: Case, side_stream, second_gpu):
    wanted = case.run(*case.make(1, "cuda:0"))
    given = case.make(1, second_gpu)
    stream = torch.cuda.Stream(second_gpu) if side_stream else torch.cuda.default_stream(second_gpu)
    torch.cuda.synchronize(second_gpu)
    with torch.cuda.stream(stream), torch.cuda.device("cuda:0"):
        results = case.run(*given)
        assert torch.cuda.current_device() == 0
    stream.synchronize()
    for actual, exact in zip(results, wanted, strict=True):
        assert actual.device == torch.device(second_gpu)
        torch.testing.assert_close(actual.cpu(), exact.cpu(), rtol=1e-4, atol=1e-5)
