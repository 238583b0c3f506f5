"""The ops that combine losses, described so that a test can make one claim about each of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from device import DEVICE, on_device
from torch import Tensor

import auxfast
from auxfast.ops import combiner, loss_image
from auxfast.ops.network import Network

from . import combiner_cases, loss_image_cases

OPS = torch.ops.auxfast


@dataclass(frozen=True)
class CombiningOp:
    """An op that combines losses, and what to try it on.

    Attributes:
        name: of the op in `module` and, with the names of its passes, in torch.ops.auxfast.
        module: where the op is, its reference, and its kernels under the names `kernels`.
        cases: the op's own `inputs`, `of_reference`, `TOLERANCES` ...
        networks: a small one for each reduction.
        few, some, many: shapes of losses without num_losses: for derivatives of every entry; for most tests; for
            several tiles or chunks.
        raw_forward: of losses, phi and network: what torch.ops.auxfast returns.
        raw_second_order: likewise, of tangents, grad, losses, phi and network.
        device: where `inputs` puts its tensors.
    """

    name: str
    module: ModuleType
    cases: ModuleType
    kernels: tuple[str, ...]
    networks: dict[str, Any]
    few: tuple[int, ...]
    some: tuple[int, ...]
    many: tuple[int, ...]
    raw_forward: Callable[[Tensor, Tensor, Any], tuple[Tensor, ...]]
    raw_second_order: Callable[[Tensor, Tensor, Tensor, Tensor, Any], tuple[Tensor, ...]]
    device: str = "cpu"

    def __str__(self) -> str:
        return self.name if self.device == "cpu" else f"{self.name} on {self.device}"

    @property
    def label(self) -> str:
        """The op in messages."""
        return self.name.replace("_", " ")

    @property
    def small(self) -> Any:
        return self.networks["mean"]

    def __call__(self, losses: Tensor, phi: Tensor, network: Network, mask: Tensor | None = None) -> Tensor:
        return getattr(self.module, self.name)(losses, phi, network, mask)

    def reference(self, losses: Tensor, phi: Tensor, network: Network) -> Tensor:
        return getattr(self.module, f"{self.name}_reference")(losses, phi, network)

    def inputs(
        self, network: Network, shape: tuple[int, ...], dtype: torch.dtype = torch.float64
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Losses (batch, num_losses, ...), phi, an incoming gradient, a tangent of the losses."""
        return self.cases.inputs(network, *shape, dtype=dtype, device=self.device)

    def derivatives(self, network: Network, *given: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        return combiner_cases.derivatives(lambda x, phi: self(x, phi, network, mask), *given)


COMBINER = CombiningOp(
    "combiner",
    combiner,
    combiner_cases,
    kernels=("_forward", "_backward_phi", "_second_order", "_hessian"),
    networks={
        "mean": combiner_cases.SMALL,
        "none": replace(combiner_cases.SMALL, reduction="none"),
        "sum": combiner.CombinerNetwork(50, (6,), reduction="sum"),
    },
    few=(3,),
    some=(5,),
    many=(700,),
    raw_forward=lambda losses, phi, network: OPS.combiner_forward(losses, phi, network.packed, True),
    raw_second_order=lambda tangents, grad, losses, phi, network: OPS.combiner_second_order(
        tangents, grad, losses, phi, losses.new_empty(0), network.packed
    ),
)
LOSS_IMAGE = CombiningOp(
    "loss_image",
    loss_image,
    loss_image_cases,
    kernels=("_forward", "_backward_phi", "_second_order", "_hessian"),
    networks={
        "mean": loss_image_cases.SMALL,
        "none": replace(loss_image_cases.SMALL, reduction="none"),
        "sum": replace(loss_image_cases.SMALL, channels=(4,), reduction="sum"),
    },
    few=(2, 3, 5),
    some=(3, 5, 6),
    many=(3, 9, 20),
    raw_forward=lambda losses, phi, network: OPS.loss_image_forward(losses, phi, None, network.packed, True, False),
    raw_second_order=lambda tangents, grad, losses, phi, network: OPS.loss_image_second_order(
        tangents, grad, losses, phi, losses.new_empty(0), network.packed
    ),
)


def on_device_rows(rows: list[tuple[Any, ...]]) -> list[Any]:
    """Rows of parameters of which the first is the op: those of the combiner on the device that is tested."""
    moved = replace(COMBINER, device=DEVICE)
    return [on_device(moved, *others) if op is COMBINER else pytest.param(op, *others) for op, *others in rows]


def readable(value: object) -> str | None:
    """Name of a parameter in a test's id; None where pytest knows better."""
    if isinstance(value, Network):
        cases = combiner_cases if isinstance(value, combiner.CombinerNetwork) else loss_image_cases
        return cases.name(value)
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    return str(value) if isinstance(value, CombiningOp) else None


BOTH = pytest.mark.parametrize("op", [COMBINER, LOSS_IMAGE], ids=str)
BOTH_ON_DEVICE = pytest.mark.parametrize("op", on_device_rows([(COMBINER,), (LOSS_IMAGE,)]), ids=str)


def printed_json(script: str, **settings: str) -> Any:
    """Output of a script, in a process of its own that runs in one thread."""
    places = [Path(auxfast.__file__).parents[1], Path(__file__).parents[1], os.environ.get("PYTHONPATH", ".")]
    settings |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, places))}
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
