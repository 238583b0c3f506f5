"""What test_private_names.py runs: the answers of auxfast for each of the given names, if torch had no such name.

Prints {"batched": {name: whether batches of vectors were used}, "wrong": {name: answers that differ}} as JSON. Each
name has a process of its own, forked after torch was imported.
"""

from __future__ import annotations

import json
import os
import re
import sys
import traceback
import warnings
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

D = torch.float64


def rename(name: str) -> None:
    pattern = re.compile(rf"(?<!\w){name}" + ("" if name.endswith("_") else r"(?!\w)"))
    usual = SourceFileLoader.get_code

    def get_code(self: SourceFileLoader, fullname: str) -> Any:
        if not fullname.startswith("auxfast"):
            return usual(self, fullname)
        return compile(pattern.sub(f"_renamed{name}", Path(self.path).read_text()), self.path, "exec")

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * grad * x**2


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * grad * x**2


class Mean(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(3, dtype=D))
        self.mean: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.add_(x.mean(0))
        return x * self.mean


def answers() -> tuple[bool, dict[str, Tensor]]:
    """Whether batches of vectors were used where they can be, and answers by what they are about."""
    import auxfast
    from auxfast.autograd.pullback import Pullback
    from auxfast.compat.auxilearn import MonoNonlinearHyperNet

    torch.manual_seed(0)
    found: dict[str, Tensor] = {}

    def gradient_of(outer: Tensor, inner: Tensor, w: list[Tensor], phi: Any) -> Tensor:
        grads = auxfast.hypergradient(outer, inner, w, phi, solver=auxfast.solvers.Dense(damping=3.0), warn=False).grads
        return torch.cat([grad.flatten() for grad in grads])

    net = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 3), nn.Softplus(), nn.Linear(3, 3)).to(D)
    x, labels, w = torch.randn(6, 3, dtype=D), torch.tensor([0, 1, 2, 0, 1, 2]), [*net.parameters()]
    combiner = auxfast.nn.NonlinearCombiner(3, (4, 4)).to(D)
    found["combiner"] = gradient_of(F.cross_entropy(net(x), labels), combiner(net(x).square()), w, [combiner.phi])
    scale = torch.randn(6, dtype=D, requires_grad=True)
    weighted = (scale.exp() * F.cross_entropy(net(x), labels, reduction="none")).sum()
    found["weights of examples"] = gradient_of(net(x).square().sum(), weighted, w, [scale])
    scaler, direct = torch.amp.GradScaler("cpu"), gradient_of(net(x).square().sum(), net(x).square().sum(), w, [scale])
    try:  # an error, or the right answer
        scaled = gradient_of(scaler.scale(net(x).square().sum()), net(x).square().sum(), w, [scale])
        found["a scaled loss"] = torch.tensor([torch.allclose(scaled, direct)])
    except ValueError:
        found["a scaled loss"] = torch.tensor([True])
    cube = torch.randn(9, dtype=D, requires_grad=True)
    inner = (Cube.apply(cube) * cube.sum()).sum() + scale.sum() * cube.sum()
    found["a Function"] = gradient_of(cube.sum(), inner, [cube], [scale])

    for after in (False, True):  # once_differentiable: an error, and no zeros
        value = Once.apply(cube).square() if after else Once.apply(cube)
        try:
            auxfast.hypergradient(cube.sum(), value.sum() + scale.sum() * cube.square().sum(), [cube], [scale])
            found[f"once differentiable {after}"] = torch.zeros(1)
        except RuntimeError as error:
            found[f"once differentiable {after}"] = torch.tensor(["OnceBackward" in str(error)])

    loss = lambda: (scale.exp() * F.cross_entropy(net(x), labels, reduction="none")).sum()  # noqa: E731
    forward = partial(auxfast.hypergradient, curvature="hessian-jvp", solver=auxfast.solvers.Identity(), warn=False)
    found["forward over reverse"] = forward(lambda: net(x).square().sum(), loss, w, [scale]).grads[0]

    outputs = [*torch.autograd.grad(F.cross_entropy(net(x).square(), labels), w, create_graph=True)]
    pullback = Pullback(outputs, w)
    vectors = [torch.randn(8, *t.shape, dtype=D) for t in w]
    found["products"] = torch.cat([t.flatten() for t in pullback.batched(vectors) if t is not None])
    added = torch.addmm(w[1], x, w[0].T, beta=2, alpha=3)
    with_addmm = Pullback([torch.autograd.grad(added.tanh().sum(), w[0], create_graph=True)[0]], w[:2])
    found["addmm"] = torch.cat([t.flatten() for t in with_addmm.batched(vectors[:1]) if t is not None])
    w[0].register_hook(lambda grad: grad.clamp(max=0.01))
    hooked = Pullback(outputs, w).batched(vectors)
    found["hooks"] = torch.cat([t.flatten() for t in hooked if t is not None])

    losses = torch.rand(5, 3, dtype=D)
    found["torch.func"] = torch.func.grad(lambda losses: combiner(losses.square()))(losses)
    found["vmap"] = torch.func.vmap(combiner)(torch.stack([losses, losses**2]))
    found["jvp"] = torch.func.jvp(combiner, (losses,), (losses,))[1]
    with torch.autograd.forward_ad.dual_level():
        dual = combiner(torch.autograd.forward_ad.make_dual(losses, losses))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
        assert tangent is not None
        found["forward mode"] = tangent
    attached = losses.clone().requires_grad_()
    (first,) = torch.autograd.grad(combiner(attached.square()), attached, create_graph=True)
    tangents = torch.rand(2, 5, 3, dtype=D)
    found["is_grads_batched"] = torch.autograd.grad(first, attached, tangents, is_grads_batched=True)[0]
    value = combiner(attached.square())
    try:  # an error, or the right answer
        two = torch.ones(2, dtype=D)
        batched = torch.autograd.grad(value, attached, two, is_grads_batched=True, create_graph=True)[0]
        (once,) = torch.autograd.grad(value, attached, create_graph=True)
        found["batched gradients with a graph"] = torch.tensor([torch.allclose(batched[0], once)])
    except NotImplementedError:
        found["batched gradients with a graph"] = torch.tensor([True])

    normed = MonoNonlinearHyperNet(0, 3, [4], weight_normalization=True).to(D)
    (gradient,) = torch.autograd.grad(normed(losses), normed.layers[0].weight_v)
    found["weight norm"] = gradient
    for kind in ("register_forward_hook", "register_forward_pre_hook"):
        calls: list[int] = []
        handle = getattr(normed.layers[0], kind)(lambda *given, calls=calls: calls.append(1))
        normed(losses)
        handle.remove()
        found[kind] = torch.tensor([len(calls)])
    for kind in ("register_full_backward_hook", "register_full_backward_pre_hook"):
        handle = getattr(normed.layers[0], kind)(lambda module, grads, *others: tuple(2 * grad for grad in grads))
        (gradient,) = torch.autograd.grad(normed(attached), attached)
        handle.remove()
        found[kind] = gradient

    mean = Mean()
    with auxfast.preserved_state():
        torch.func.grad(lambda x: mean.eval()(x).sum())(losses)
        mean.train()(losses)
        found["copies of buffers"] = mean.mean.clone()
    found["buffers"] = mean.mean
    return pullback.num_batched > 0, {key: value.detach() for key, value in found.items()}


def in_a_process(name: str | None) -> Any:
    """What `answers` finds with `name` renamed, as lists."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            if name is not None:
                rename(name)
            batched, found = answers()
            with os.fdopen(writing, "w") as pipe:
                json.dump([batched, {key: value.flatten().tolist() for key, value in found.items()}], pipe)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text) if text else [False, {}]  # it had an error, which is on stderr


def same(found: list[Any], expected: list[Any]) -> bool:
    a, b = (torch.tensor(values, dtype=D) for values in (found, expected))
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-9)


def main(names: list[str]) -> None:
    warnings.filterwarnings("ignore", "There is a performance drop")
    torch.set_num_threads(1)
    torch.func.jvp(torch.sin, (torch.ones(1),), (torch.ones(1),))  # what this imports is then in all processes
    used, expected = in_a_process(None)
    assert expected
    batched, wrong = {"nothing": int(used)}, {}
    for name in names:
        used, found = in_a_process(name)
        batched[name] = int(used)
        wrong[name] = [key for key, value in expected.items() if not same(found.get(key, []), value)]
    print(json.dumps({"batched": batched, "wrong": wrong}))


if __name__ == "__main__":
    main(sys.argv[1:])
