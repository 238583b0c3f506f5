"""Weights of auxiliary losses: one auxiliary helps, one harms, and 20 held-out samples tell which.

A linear network predicts the first of 30 features from 100 samples with very noisy labels. The helpful auxiliary has
the same target and less noise, the harmful one wants the negative. The weights of the three losses are learned on 20
held-out samples, whose labels were measured with care.
"""

from __future__ import annotations

import torch
from torch import Tensor

import auxfast

FEATURES, STEPS, STEPS_PER_OUTER_STEP = 30, 600, 5
METHODS = ("main loss alone", "main loss, trained on the held-out samples too", "plain sum", "learned weights")


def train(method: str) -> tuple[float, list[list[float]]]:
    """The test error of a trained network, and the weights of the three losses after each outer step."""
    torch.manual_seed(0)
    x, held_out, test = torch.randn(100, FEATURES), torch.randn(20, FEATURES), torch.randn(1000, FEATURES)
    noise = torch.randn(100, 2) * torch.tensor([1.0, 0.3])
    labels = torch.cat([x[:, :1] + noise, -x[:, :1]], dim=1)  # (100, 3): main, helpful, harmful
    net = torch.nn.Linear(FEATURES, 1)
    inner = torch.optim.SGD(net.parameters(), lr=0.02)
    combiner = auxfast.nn.LinearCombiner(3, main=0)  # main loss + a sum of learned weight * loss
    outer = auxfast.HyperOptimizer.recommended(combiner)

    def losses() -> Tensor:  # (batch, num_losses)
        errors: Tensor = net(x) - labels
        return errors.square()

    def squared_errors(samples: Tensor) -> Tensor:
        errors: Tensor = net(samples) - samples[:, :1]
        return errors.square()

    history = []
    for step in range(1, STEPS + 1):
        inner.zero_grad()
        if method == "main loss alone":
            losses()[:, 0].mean().backward()
        elif method == "main loss, trained on the held-out samples too":
            torch.cat([losses()[:, :1], squared_errors(held_out)]).mean().backward()
        else:
            combiner(losses()).backward()
        inner.step()
        if method == "learned weights" and step % STEPS_PER_OUTER_STEP == 0:
            outer.step(squared_errors(held_out).mean(), combiner(losses()), net.parameters())
            history.append(combiner.loss_weights(losses())[0].tolist())
    return squared_errors(test).mean().item(), history


def main() -> tuple[dict[str, float], list[list[float]]]:
    """The test error with each method, and the course of the learned weights."""
    results = {method: train(method) for method in METHODS}
    for method, (error, _) in results.items():
        print(f"test error {error:.3f}   {method}")
    history = results["learned weights"][1]
    for number in (1, 20, 40, 80, 120):
        main_weight, helpful, harmful = history[number - 1]
        print(f"outer step {number:>3}   main {main_weight:.2f}, helpful {helpful:.2f}, harmful {harmful:.2f}")
    return {method: error for method, (error, _) in results.items()}, history


if __name__ == "__main__":
    main()
