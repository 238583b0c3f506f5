"""A weight for each training example, learned on held-out samples: wrong labels lose theirs.

A linear model has 40 features. Of its 200 training labels 60 are wrong, and nobody knows which; 40 samples that are
held out have right labels. They are too few to train on, and enough to find out whom to trust.
"""

from __future__ import annotations

import torch
from torch import Tensor

import auxfast

FEATURES, COUNT, WRONG = 40, 200, 60


def main() -> dict[str, float]:
    """Test errors of four ways to use the data, and the mean weight of right and of wrong labels."""
    torch.manual_seed(0)
    truth = torch.randn(FEATURES)

    def samples(count: int) -> tuple[Tensor, Tensor]:
        features = torch.randn(count, FEATURES)
        return features, features @ truth + 0.5 * torch.randn(count)

    (x, y), (held_out_x, held_out_y), (test_x, test_y) = samples(COUNT), samples(40), samples(2000)
    wrong = torch.arange(COUNT) < WRONG
    y = torch.where(wrong, y.std() * torch.randn(COUNT), y)

    def test_error(model: Tensor) -> float:
        return (test_x @ model - test_y).square().mean().item()

    def least_squares(features: Tensor, labels: Tensor) -> float:
        return test_error(torch.linalg.lstsq(features, labels[:, None]).solution[:, 0])

    errors = {
        "equal weights": least_squares(x, y),
        "held-out samples alone": least_squares(held_out_x, held_out_y),
        "both": least_squares(torch.cat([x, held_out_x]), torch.cat([y, held_out_y])),
    }

    w = torch.zeros(FEATURES, requires_grad=True)
    logits = torch.zeros(COUNT, requires_grad=True)
    inner = torch.optim.SGD([w], lr=0.1)
    outer = auxfast.HyperOptimizer(torch.optim.Adam([logits], lr=0.1))

    def inner_loss() -> Tensor:
        return (logits.softmax(0) * (x @ w - y).square()).sum()

    def outer_loss() -> Tensor:
        return (held_out_x @ w - held_out_y).square().mean()

    for _ in range(50):
        for _ in range(10):
            inner.zero_grad()
            inner_loss().backward()
            inner.step()
        outer.step(outer_loss, inner_loss, [w])
    errors["learned weights"] = test_error(w.detach())

    weights = COUNT * logits.detach().softmax(0)  # 1 each at the start
    right_weight, wrong_weight = weights[~wrong].mean().item(), weights[wrong].mean().item()
    for name, error in errors.items():
        print(f"test error {error:5.2f}   {name}")
    print(f"mean weight {right_weight:.2f} of right labels, {wrong_weight:.2f} of wrong ones")
    return {**errors, "right": right_weight, "wrong": wrong_weight}


if __name__ == "__main__":
    main()
