"""Weights of auxiliary losses, learned by several processes, each of which has a part of the data.

    torchrun --nproc-per-node 2 examples/distributed.py
    python examples/distributed.py    # the same figures, by one process

The losses are those of auxiliary_losses.py: a helpful auxiliary with less noise than the main loss, and a harmful one
that wants the negative. Training is the usual one of DistributedDataParallel, and `process_group=` is all that
hypergradients need. 41 samples are held out, so that one of two ranks has one more than the other.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

import auxfast

FEATURES, STEPS, STEPS_PER_OUTER_STEP = 20, 400, 5


def main() -> dict[str, float]:
    """The test error and the learned weights, the same on all ranks."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
    if size > 1:
        distributed.init_process_group("gloo")  # "nccl" where each rank has a GPU
    group = distributed.group.WORLD if size > 1 else None

    torch.manual_seed(0)  # all ranks draw the same, and take their parts of the samples
    x, held_out, test = torch.randn(240, FEATURES), torch.randn(41, FEATURES), torch.randn(2000, FEATURES)
    noise = torch.randn(240, 2) * torch.tensor([2.0, 0.3])
    labels = torch.cat([x[:, :1] + noise, -x[:, :1]], dim=1)  # (240, 3): main, helpful, harmful
    x, labels, held_out = x[rank::size], labels[rank::size], held_out[rank::size]

    net = nn.Linear(FEATURES, 1)
    trained = DistributedDataParallel(net) if size > 1 else net
    inner = torch.optim.SGD(net.parameters(), lr=0.05)
    combiner = auxfast.nn.LinearCombiner(3, main=0)  # main loss + a sum of learned weight * loss
    adam = torch.optim.Adam(combiner.parameters(), lr=0.05)
    outer = auxfast.HyperOptimizer(adam, project=[combiner], process_group=group)

    def losses(network: nn.Module) -> Tensor:  # (batch, num_losses)
        errors: Tensor = network(x) - labels
        return errors.square()

    def error_of(samples: Tensor) -> Tensor:
        errors: Tensor = net(samples) - samples[:, :1]
        return errors.square().mean()

    for step in range(1, STEPS + 1):
        inner.zero_grad()
        combiner(losses(trained)).backward()  # DistributedDataParallel takes the mean of the ranks' gradients
        inner.step()
        if step % STEPS_PER_OUTER_STEP == 0:
            # Each loss is the mean over this rank's samples, and stands with their number.
            held_out_loss, training_loss = lambda: error_of(held_out), lambda: combiner(losses(net))
            outer.step([(len(held_out), held_out_loss)], [(len(x), training_loss)], net.parameters())

    error = error_of(test).item()
    _, helpful, harmful = combiner.mean_weights(losses(net).detach()).tolist()
    if rank == 0:
        print(f"test error {error:.4f}, weight of the helpful loss {helpful:.3f}, of the harmful one {harmful:.3f}")
    if size > 1:
        distributed.destroy_process_group()
    return {"error": error, "helpful": helpful, "harmful": harmful}


if __name__ == "__main__":
    main()
