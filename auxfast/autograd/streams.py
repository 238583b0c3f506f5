"""The streams of a GPU: the one that is current, and those that autograd's engine uses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def current_stream(device: torch.device) -> Any:
    """The current stream of a CUDA device; `None` on other devices."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def is_capturing(device: torch.device) -> bool:
    """Whether what is launched on the device is recorded in a CUDA graph, and not run."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class StreamDetector:
    """Finds out on which streams of a device the engine runs nodes: on those of their forward passes, and a hook of a
    node runs where the node does. torch does not tell in any other way.

    Args:
        nodes: those to watch, while the `with` statement lasts.
        device: where streams are looked at; on a CPU nothing is done.

    Attributes:
        found: the streams.
    """

    def __init__(self, nodes: Sequence[Any], device: torch.device) -> None:
        self.found: set[Any] = set()
        self._device = device
        self._nodes = nodes if current_stream(device) is not None else ()
        self._handles: list[Any] = []

    def __enter__(self) -> StreamDetector:
        self._handles = [node.register_prehook(self._note) for node in self._nodes]
        return self

    def __exit__(self, *exception: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _note(self, gradients: Sequence[Tensor | None]) -> None:
        self.found.add(current_stream(self._device))
