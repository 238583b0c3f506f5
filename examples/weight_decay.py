"""A weight decay for each group of features, learned on held-out samples.

A linear model has 60 features and 80 samples. Ten features determine the target, ten contribute a little, and forty
nothing. One weight decay for all has to be a compromise. The program learns one for each group, and compares them with
the best of 25 common ones, chosen by the same held-out samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

import auxfast

GROUPS = {"effective": 10, "weak": 10, "useless": 40}  # numbers of features
EFFECT = torch.cat([torch.full((10,), 1.0), torch.full((10,), 0.1), torch.zeros(40)])


def samples(count: int) -> tuple[Tensor, Tensor]:
    """Features (count, 60), and targets (count,) with noise."""
    x = torch.randn(count, len(EFFECT))
    return x, x @ EFFECT + 2 * torch.randn(count)


def main() -> dict[str, float]:
    """The test errors with the best common decay and with the learned ones, and each learned decay."""
    torch.manual_seed(0)
    (x, y), (held_out_x, held_out_y), (test_x, test_y) = samples(80), samples(40), samples(2000)
    sizes = torch.tensor(list(GROUPS.values()))
    w = torch.zeros(len(EFFECT), requires_grad=True)
    log_decays = torch.zeros(len(GROUPS), requires_grad=True)

    def inner_loss() -> Tensor:
        decays = log_decays.exp().repeat_interleave(sizes)
        return (x @ w - y).square().mean() + (decays * w.square()).sum()

    def outer_loss() -> Tensor:
        return (held_out_x @ w - held_out_y).square().mean()

    @torch.no_grad()
    def train() -> float:
        """Puts w at the minimum of the inner loss, which has a closed form here; returns the held-out error."""
        decays = log_decays.exp().repeat_interleave(sizes)
        w.copy_(torch.linalg.solve(x.T @ x / len(x) + torch.diag(decays), x.T @ y / len(x)))
        return outer_loss().item()

    @torch.no_grad()
    def test_error() -> float:
        return (test_x @ w - test_y).square().mean().item()

    tried = {}
    for exponent in torch.linspace(-4, 2, 25).tolist():
        log_decays.data.fill_(exponent)
        tried[train()] = test_error()
    best_common = tried[min(tried)]

    log_decays.data.zero_()
    outer = auxfast.HyperOptimizer(torch.optim.Adam([log_decays], lr=0.1))
    for _ in range(100):
        train()
        stats = outer.step(outer_loss, inner_loss, [w])
    train()
    print(f"test error {best_common:.2f} with the best common decay, {test_error():.2f} with the learned ones")
    learned = dict(zip(GROUPS, log_decays.exp().tolist(), strict=True))
    for name, decay in learned.items():
        print(f"weight decay of the {GROUPS[name]} {name} features: {decay:.3g}")
    print(f"relative residual of the last solve: {stats.residual:.1e}, after {stats.matvecs} products")
    return {"common": best_common, "learned": test_error(), **learned}


if __name__ == "__main__":
    main()
