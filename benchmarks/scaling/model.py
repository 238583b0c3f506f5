"""Time of a curvature product on many GPUs: compute + vectors + latency + 2 (p - 1) / p * bytes / bandwidth.

    python -m benchmarks.scaling.model    the tables, from the newest figures in benchmarks/results

The last term is the all-reduce of a product, with the least that each of p ranks must send. What a product costs beside
a gradient, and how well the same formula foretells hypergradients on gloo, is measured; GPUs are as their data sheets
have them, and what no data sheet has is named an assumption.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).resolve().parents[1] / "results"
PAGE = RESULTS.parents[1] / "docs" / "scaling.md"
BYTES = 4  # of a number: sums are float32
VECTOR_BYTES = 116
"""Bytes of memory that a step of MINRES reads and writes for each parameter, on every rank: 92 in its four passes (see
csrc/krylov/minres_math.h), 24 in three copies of the product."""


@dataclass(frozen=True)
class Cluster:
    """NVIDIA's data sheets of H100 SXM and DGX H100: eight GPUs a node, and a network card of 400 Gbit/s for each.

    Attributes:
        flops: of bfloat16, dense.
        used: the part of them that a network reaches; an assumption.
        memory: bytes a second.
        in_node: bytes a second and direction of a GPU's NVLink.
        between: of a node's network cards together: a ring enters and leaves every node once for each card.
        hop: seconds of latency of one of the 2 log2(p) steps of a tree; an assumption.
    """

    flops: float = 989e12
    used: float = 0.4
    memory: float = 3.35e12
    node: int = 8
    in_node: float = 450e9
    between: float = 400e9
    hop: float = 5e-6

    def all_reduce(self, ranks: int, parameters: float) -> float:
        bandwidth = self.in_node if ranks <= self.node else min(self.in_node, self.between)
        return all_reduce(ranks, BYTES * parameters, 2 * self.hop * math.log2(ranks), bandwidth)

    def vectors(self, parameters: float) -> float:
        return VECTOR_BYTES * parameters / self.memory


@dataclass(frozen=True)
class Size:
    """A network, its data in units (images, tokens), and the operations of a gradient with its forward pass.

    Attributes:
        operations: for one unit.
        local: a usual number of units on one GPU.
        measured: the network whose product was measured beside its gradient.
    """

    name: str
    parameters: float
    unit: str
    operations: float
    local: int
    measured: str


SIZES = (
    Size("ResNet-18", 11.7e6, "images", 3 * 3.6e9, 64, "ResNet-18"),  # 1.8e9 multiplications and additions of an image
    Size("transformer, 125 M", 125e6, "tokens", 6 * 125e6, 8192, "transformer"),
    Size("transformer, 1 B", 1e9, "tokens", 6 * 1e9, 8192, "transformer"),
)


def all_reduce(ranks: int, size: float, latency: float, bandwidth: float) -> float:
    """Seconds for `size` bytes."""
    return latency + 2 * (ranks - 1) / ranks * size / bandwidth


def fit(rows: Sequence[dict[str, Any]]) -> dict[int, tuple[float, float]]:
    """Latency and bandwidth by the number of ranks: the least sum of squares of relative errors."""
    found = {}
    for ranks in sorted({row["ranks"] for row in rows}):
        chosen = [row for row in rows if row["ranks"] == ranks]
        seconds = np.array([row["least"] for row in chosen])
        sent = np.array([2 * (ranks - 1) / ranks * row["bytes"] for row in chosen])
        slope, latency = np.polyfit(sent, seconds, 1, w=1 / seconds)
        found[ranks] = float(latency), 1 / float(slope)
    return found


def foretold(figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Hypergradients on several ranks: those of one rank's part by one rank, which take longer where ranks share cores,
    and an all-reduce of W for every product and for the outer gradient."""
    alone = {row["batch"]: row for row in figures["speeds"] if row["ranks"] == 1}
    fitted, cores = fit(figures["all-reduces"]), figures["cores"]
    rows = []
    for row in figures["speeds"]:
        if (ranks := row["ranks"]) > 1:
            whole, part = alone[row["batch"]], alone[row["batch"] // ranks]
            compute = part["least"] * max(1, ranks / cores)
            wire = (figures["steps"] + 1) * all_reduce(ranks, BYTES * figures["parameters"], *fitted[ranks])
            rows.append({**row, "whole": whole, "part": part, "model": compute + wire})
    return rows


def tables(figures: dict[str, Any]) -> dict[str, str]:
    """Tables in Markdown by title: what was measured, the check of the model, and the model of GPUs. Seconds are the
    least of all rounds, ratios in parentheses those of medians."""
    ratios = {row["network"]: row["product"] / row["gradient"] for row in figures["products"]}
    return {
        "Whole calls": _speeds(foretold(figures)),
        "Where the time of two ranks goes": _waits(figures["waits"]),
        "Small calls": _small_calls(figures["small calls"]),
        "All-reduces": _all_reduces(figures["all-reduces"]),
        "Their fit": _fits(figures["all-reduces"]),
        "Products": _products(figures["products"]),
        "What a call sends": _communication(figures["communication"]),
        "Weak scaling on GPUs": _gpus(Cluster(), ratios),
        "Least local batch on GPUs": _least_batches(Cluster(), ratios),
    }


def as_text(found: dict[str, str]) -> str:
    return "\n\n".join(f"### {title}\n\n{table}" for title, table in found.items())


def _write_to_docs(found: dict[str, str]) -> None:
    """Puts each table where the page has its title in a comment, in the place of the one that is there."""
    text = PAGE.read_text()
    for title, table in found.items():
        text, count = re.subn(rf"(?<=<!-- {title} -->\n\n)\|.*?(?=\n\n|\n$)", lambda _: table, text, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise ValueError(f"{PAGE} must have one table after <!-- {title} -->, not {count}")
    PAGE.write_text(text)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows))


def _speeds(rows: list[dict[str, Any]]) -> str:
    return _table(
        ("ranks", "batch", "one rank, s", "ranks, s", "speed-up", "by the model", "of CPU time", "weak efficiency"),
        (
            (
                *(str(row["ranks"]), str(row["batch"]), f"{row['whole']['least']:.2f}", f"{row['least']:.2f}"),
                f"{row['whole']['least'] / row['least']:.2f} ({row['whole']['median'] / row['median']:.2f})",
                f"{row['whole']['least'] / row['model']:.2f}",
                f"{row['whole']['cpu'] / row['cpu']:.2f}",
                f"{row['part']['least'] / row['least']:.0%}",
            )
            for row in rows
        ),
    )


def _waits(rows: list[dict[str, Any]]) -> str:
    names = ("call", "all-reduces", "waiting")
    header = ("batch", "call, s", "all-reduces, s", "waiting for the other, s")
    return _table(header, ((str(row["batch"]), *(f"{row[name]:.3f}" for name in names)) for row in rows))


def _small_calls(ways: dict[str, Any]) -> str:
    return _table(
        ("process_group", "median ms", "of none", "CPU ms", "of none"),
        (
            (name, *(text for key in ("median", "cpu") for text in _beside(way[key], ways["none"][key])))
            for name, way in ways.items()
        ),
    )


def _beside(seconds: float, others: float) -> tuple[str, str]:
    return f"{seconds * 1e3:.3f}", f"{seconds / others:.3f}"


def _all_reduces(rows: list[dict[str, Any]]) -> str:
    fitted = fit(rows)
    return _table(
        ("ranks", "bytes", "ms", "by the fit, ms"),
        (
            (
                str(row["ranks"]),
                str(row["bytes"]),
                f"{row['least'] * 1e3:.2f}",
                f"{all_reduce(row['ranks'], row['bytes'], *fitted[row['ranks']]) * 1e3:.2f}",
            )
            for row in rows
        ),
    )


def _fits(rows: list[dict[str, Any]]) -> str:
    fitted = fit(rows).items()
    return _table(
        ("ranks", "latency, ms", "bandwidth, GB/s"),
        ((str(ranks), f"{latency * 1e3:.2f}", f"{bandwidth / 1e9:.2f}") for ranks, (latency, bandwidth) in fitted),
    )


def _products(rows: list[dict[str, Any]]) -> str:
    return _table(
        ("network", "parameters", "gradient, s", "product, s", "product / gradient", "time after half is known"),
        (
            (
                row["network"],
                f"{row['parameters'] / 1e6:.1f} M",
                f"{row['gradient']:.3f}",
                f"{row['product']:.3f}",
                f"{row['product'] / row['gradient']:.2f}",
                f"{row['tail']:.0%}",
            )
            for row in rows
        ),
    )


def _communication(rows: list[dict[str, Any]]) -> str:
    return _table(
        ("solver", "products", "of W", "of phi", "others", "numbers in each"),
        (
            (
                f"`{row['solver']}`",
                *(str(row[name]) for name in ("products", "of W", "of phi", "others")),
                f"at most {row['most numbers of others']}",
            )
            for row in rows
        ),
    )


def _gpus(cluster: Cluster, ratios: dict[str, float]) -> str:
    rows = []
    for size in SIZES:
        compute, vectors = _compute(cluster, size, ratios, size.local), cluster.vectors(size.parameters)
        for ranks in (8, 64, 512):
            wire = cluster.all_reduce(ranks, size.parameters)
            rows.append(
                (
                    f"{size.name}, {size.local} {size.unit}",
                    str(ranks),
                    *(f"{seconds * 1e3:.2f}" for seconds in (compute, vectors, wire)),
                    f"{(compute + vectors) / (compute + vectors + wire):.0%}",
                )
            )
    return _table(("network, on each GPU", "GPUs", "compute, ms", "vectors, ms", "all-reduce, ms", "efficiency"), rows)


def _least_batches(cluster: Cluster, ratios: dict[str, float]) -> str:
    """The local batch at which adding ranks with the same whole batch still has 80% and 50% of the speed."""
    rows = []
    for size in SIZES:
        for ranks in (8, 512):
            rest = cluster.vectors(size.parameters) + cluster.all_reduce(ranks, size.parameters)
            one = _compute(cluster, size, ratios, 1)
            rows.append(
                (size.name, str(ranks), *(f"{part / (1 - part) * rest / one:.0f} {size.unit}" for part in (0.8, 0.5)))
            )
    return _table(("network", "GPUs", "for 80%", "for 50%"), rows)


def _compute(cluster: Cluster, size: Size, ratios: dict[str, float], units: int) -> float:
    return ratios[size.measured] * size.operations * units / (cluster.flops * cluster.used)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling.model", description=__doc__)
    parser.add_argument("--docs", action="store_true", help="write the tables to docs/scaling.md, too")
    given = parser.parse_args()
    newest = max(RESULTS.glob("scaling-*.json"), key=lambda path: path.stat().st_mtime)
    found = tables(json.loads(newest.read_text()))
    print(as_text(found))
    if given.docs:
        _write_to_docs(found)


if __name__ == "__main__":
    main()
