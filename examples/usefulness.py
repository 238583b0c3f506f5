"""Which auxiliary losses would help? One solve scores all of them, before any is trained on.

A network is trained on its main loss. Four auxiliaries are scored: how fast would the held-out loss fall with the
weight of each? Then the network is really trained with a small weight on each auxiliary, and the change of the
held-out loss is printed beside the prediction.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import auxfast

WEIGHT = 0.002  # of the auxiliary that is trained on


def train(net: nn.Module, x: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Minimises the weighted sum of the losses, one for each column of `targets`; returns the losses."""
    optimizer = torch.optim.LBFGS(net.parameters(), max_iter=2000, tolerance_grad=1e-9, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = losses(net, x, targets) @ weights
        loss.backward()
        return loss

    optimizer.step(closure)
    return losses(net, x, targets)


def losses(net: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
    """(num_losses,): the mean squared error of each target; the first is the main loss, which has a weight decay."""
    errors = (net(x) - targets).square().mean(dim=0)
    decay = 0.03 * torch.stack([param.square().sum() for param in net.parameters()]).sum()
    return torch.cat([errors[:1] + decay, errors[1:]])


def main() -> dict[str, tuple[float, float]]:
    """Predicted and measured change of the held-out loss, for each auxiliary."""
    torch.manual_seed(1)
    x, held_out = torch.randn(100, 10).double(), torch.randn(200, 10).double()  # float64: the changes are small
    truth = x[:, 0].sin()
    auxiliaries = {
        "the same target, without noise": truth,
        "a related target": x[:, 0],
        "the opposite": -truth,
        "another feature": x[:, 1],
    }
    targets = torch.stack([truth + 0.4 * torch.randn(100), *auxiliaries.values()], dim=1)
    net = nn.Sequential(nn.Linear(10, 8), nn.Tanh(), nn.Linear(8, 1)).double()

    def outer_loss() -> Tensor:
        errors: Tensor = net(held_out)[:, 0] - held_out[:, 0].sin()
        return errors.square().mean()

    main_loss, *aux_losses = train(net, x, targets, torch.eye(5).double()[0])
    before = outer_loss()
    scores = auxfast.auxiliary_usefulness(before, main_loss, aux_losses, net.parameters()).scores.tolist()

    start = {name: value.clone() for name, value in net.state_dict().items()}
    changes = {}
    print(f"held-out loss {before.item():.4f}; its change, divided by the weight on an auxiliary:")
    for number, (name, score) in enumerate(zip(auxiliaries, scores, strict=True), start=1):
        net.load_state_dict(start)
        train(net, x, targets, torch.eye(5).double()[0] + WEIGHT * torch.eye(5).double()[number])
        measured = (outer_loss() - before).item() / WEIGHT
        changes[name] = -score, measured
        print(f"predicted {-score:+.3f}, measured {measured:+.3f}   {name}")
    return changes


if __name__ == "__main__":
    main()
