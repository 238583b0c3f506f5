"""A weight for each training sequence of a transformer that is fine-tuned by LoRA: corrupted sequences lose theirs.

The transformer is a small GPT-2 of Hugging Face (pip install transformers) with random weights, frozen in bfloat16;
adapters in float32 beside its linear layers are trained. Every clean sequence follows one rule from token to token.
Half of the training sequences are corrupted, and nobody knows which; the held-out ones are clean.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

import auxfast

TOKENS, LENGTH, COUNT, RANK = 16, 10, 24, 2
CORRUPTED = torch.arange(COUNT) < COUNT // 2
SIZES = {"vocab_size": TOKENS, "n_positions": LENGTH, "n_embd": 32, "n_layer": 2, "n_head": 2}
SIZES |= {"bos_token_id": 0, "eos_token_id": 0}  # nothing is generated


def adapt(layer: Conv1D) -> None:
    """Adds a product of two narrow matrices, which begins with 0, to a linear layer (GPT-2's are named Conv1D)."""
    num_inputs, num_outputs = layer.weight.shape
    layer.down = nn.Parameter(torch.randn(num_inputs, RANK) / num_inputs**0.5)
    layer.up = nn.Parameter(torch.zeros(RANK, num_outputs))
    layer.register_forward_hook(lambda layer, x, y: y + (x[0].to(layer.up.dtype) @ layer.down @ layer.up).to(y.dtype))


class Reweighting:
    """The adapted model, the logits of the sequences' weights, and the losses of both."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        # Eager attention has second derivatives; the fused kernels of scaled_dot_product_attention have none.
        config = GPT2Config(**SIZES, initializer_range=0.2, attn_implementation="eager")
        self.model = GPT2LMHeadModel(config).requires_grad_(False).eval().bfloat16()
        for layer in [module for module in self.model.modules() if isinstance(module, Conv1D)]:
            adapt(layer)
        self.adapters = [w for w in self.model.parameters() if w.requires_grad]
        self.logits, self.decay = torch.zeros(COUNT, requires_grad=True), 0.01
        clean, self.held_out = (torch.randint(TOKENS, (2, COUNT, 1)) + 3 * torch.arange(LENGTH)) % TOKENS
        self.training = torch.where(CORRUPTED[:, None], torch.randint(TOKENS, (COUNT, LENGTH)), clean)

    def losses(self, sequences: Tensor) -> Tensor:
        """The mean cross-entropy of each sequence, (COUNT,), in the dtype of the adapters."""
        predictions = self.model(sequences, use_cache=False).logits[:, :-1].to(self.adapters[0].dtype)
        return cross_entropy(predictions.transpose(1, 2), sequences[:, 1:], reduction="none").mean(dim=1)

    def inner_loss(self) -> Tensor:
        size = torch.stack([w.square().sum() for w in self.adapters]).sum()
        return (self.logits.softmax(0) * self.losses(self.training)).sum() + self.decay * size

    def outer_loss(self) -> Tensor:
        return self.losses(self.held_out).mean()


def main(outer_steps: int = 20) -> list[tuple[float, float, float]]:
    """The held-out loss, and the mean weight of clean and of corrupted sequences, before each outer step and after."""
    task, history = Reweighting(), []
    inner = torch.optim.Adam(task.adapters, lr=0.02)
    solver = auxfast.solvers.MINRES(steps=5, tol=None, damping=0.1)
    outer = auxfast.HyperOptimizer(torch.optim.Adam([task.logits], lr=0.2), solver=solver, warn=False)
    for step in range(outer_steps + 1):
        for _ in range(5):
            inner.zero_grad()
            task.inner_loss().backward()
            inner.step()
        weights = COUNT * task.logits.detach().softmax(0)
        history.append((task.outer_loss().item(), weights[~CORRUPTED].mean().item(), weights[CORRUPTED].mean().item()))
        print("{:2}: held-out loss {:.2f}, mean weight {:.2f} of clean, {:.2f} of corrupted".format(step, *history[-1]))
        if step < outer_steps:
            outer.step(task.outer_loss, task.inner_loss, task.adapters)
    return history


if __name__ == "__main__":
    main()
