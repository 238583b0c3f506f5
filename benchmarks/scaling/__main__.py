"""Measures under torchrun, prints the tables, and keeps the figures."""

from __future__ import annotations

import argparse
import json
import os
import re
from itertools import pairwise
from pathlib import Path

import torch
from torch import distributed

from auxfast.train.environment import environment
from benchmarks.scaling import measure, model
from benchmarks.scaling.problem import STEPS, networks

WIDTHS, BATCHES = (512, 1024, 1024, 512), (512, 1024, 2048, 4096)  # 2,099,712 parameters
SIZES = tuple(4096 * 4**i for i in range(7))  # bytes, up to 16 MiB


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="small sizes and one round; nothing is kept")
    parser.add_argument(
        "--rounds", type=int, default=3, help="timed calls of the largest hypergradients, and more of others (3)"
    )
    parser.add_argument("--results", type=Path, default=model.RESULTS, help="folder of the figures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    groups = {size: distributed.new_group(range(size)) for size in (2**i for i in range(world.bit_length()))}
    widths, batches = ((8, 16, 4), (16, 32)) if given.smoke else (WIDTHS, BATCHES)
    rounds = 1 if given.smoke else given.rounds
    figures = {
        "speeds": measure.speeds(groups, widths, batches, rounds),
        "waits": measure.waits(groups[2], widths, (batches[0], batches[-1]), rounds) if rank < 2 else [],
        "small calls": measure.small_calls(groups, 3 if given.smoke else 300),
        "all-reduces": measure.all_reduces(groups, SIZES[:2] if given.smoke else SIZES, 3 if given.smoke else 20),
        "products": measure.products(networks(given.smoke), rounds),
        "communication": measure.communication(groups[2]) if rank < 2 else [],
    }
    distributed.barrier()
    if rank == 0:
        parameters = sum((a + 1) * b for a, b in pairwise(widths))
        figures |= {"cores": os.cpu_count(), "steps": STEPS, "parameters": parameters, "environment": environment()}
        print(model.as_text(model.tables(figures)))
        if not given.smoke:
            path = given.results / f"scaling-{_machine()}.json"
            path.write_text(json.dumps(figures) + "\n")
            print(f"\nWrote {path}")
    distributed.destroy_process_group()


def _machine() -> str:
    name = re.sub(r"\(.*?\)|@.*|CPU|Processor", "", environment()["cpu"]["model"])
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


if __name__ == "__main__":
    main()
