"""Processes that `torchrun` has started: they are joined to a group, and tell each other why they end."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import distributed
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from auxfast.implicit.ranks import ProcessGroup
from auxfast.train.files import RunError

TIMEOUT = timedelta(minutes=30)  # while the first rank scores, the others wait; one that has died is noticed at once
_ROLL_CALL = 3.0  # seconds; a rank that lives hears of another's end at once, or is told by torchrun to end


@dataclass
class Launch:
    """This process among those of a launch.

    Args:
        rank, size: number of this process, and of all.
        local_rank: its number on this machine, and that of its GPU.
    """

    rank: int
    size: int
    local_rank: int
    _store: Any = field(default=None, repr=False)

    def join(self, devices: Iterable[str]) -> ProcessGroup:
        """The group of all processes, with gloo for the CPU, and NCCL for `cuda`, which becomes the GPU of this one.

        Args:
            devices: those that will be asked for.

        Raises:
            RunError: another device; there is no such GPU; or torch cannot do that.
        """
        kinds = set(devices)
        for name in kinds - {"cpu", "cuda"}:
            raise RunError(
                f"train.device: got {name!r}, must be 'cpu' or 'cuda' with {self.size} processes: each takes the GPU "
                "of its own number"
            )
        if not distributed.is_available():
            raise RunError(f"this torch has no torch.distributed, and cannot join {self.size} processes: start one")
        backend = "gloo"
        if "cuda" in kinds:
            if self.local_rank >= torch.cuda.device_count():
                raise RunError(
                    f"train.device: got 'cuda' for process {self.local_rank} of this machine, which has "
                    f"{torch.cuda.device_count()} GPUs: start one process for each"
                )
            torch.cuda.set_device(self.local_rank)
            backend = "cpu:gloo,cuda:nccl"
        distributed.init_process_group(
            backend, store=self._open_store(), rank=self.rank, world_size=self.size, timeout=TIMEOUT
        )
        return distributed.group.WORLD

    def leave(self) -> None:
        """Ends the group, when all is done."""
        distributed.destroy_process_group()

    def end(self, reason: str) -> str:
        """Tells the other processes why this one ends by itself. Without a reason it ends because of another one, and
        waits for all to tell theirs. Returns words for those that ended by themselves, or tell nothing within seconds.
        """
        try:
            store = self._open_store()
            store.set(self._key(self.rank), reason)
            return "" if reason else self._reasons(store)
        except RuntimeError:
            return "the launcher or, without one, rank 0 was killed"

    def _reasons(self, store: Any) -> str:
        others = [rank for rank in range(self.size) if rank != self.rank]
        silent, deadline = others, time.monotonic() + _ROLL_CALL
        while silent and time.monotonic() < deadline:
            time.sleep(0.02)
            silent = [rank for rank in silent if not store.check([self._key(rank)])]
        told = {rank: store.get(self._key(rank)).decode() for rank in others if rank not in silent}
        ended = [f"rank {rank} has ended: {reason}" for rank, reason in told.items() if reason]
        return "; ".join([*ended, *(f"rank {rank} was killed, or does not answer" for rank in silent)])

    def _key(self, rank: int) -> str:
        return f"ended/{rank}"

    def _open_store(self) -> Any:
        """The store that torchrun keeps, or the first process where there is no torchrun."""
        if self._store is None:
            store, _, _ = next(rendezvous("env://", self.rank, self.size, timeout=TIMEOUT))
            self._store = PrefixStore("auxfast", store)
        return self._store


def launch() -> Launch | None:
    """This process among those that torchrun, or another launcher with the same environment variables, has started;
    None where there is but one."""
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size == 1 or "RANK" not in os.environ or "MASTER_ADDR" not in os.environ:
        return None
    return Launch(int(os.environ["RANK"]), size, int(os.environ.get("LOCAL_RANK", 0)))
