"""The combiner op against the same network as torch.nn modules, in first and second order.

"full" is what one hypergradient asks of a combiner besides the Hessian products: its gradient in the losses, and the
vjp of that in losses and phi. "Hessian" is one Hessian product through a retained graph.

Found while tuning (Sapphire Rapids, one core): at batch 64 four fifths of the time are autograd's Python and the
dispatcher, so what counts there is the number of Functions, tensors and op calls; kernels take 2 to 5 us. At (1024, 11)
and above the kernels dominate, and in them the activation (5 ns per 16 samples and unit). What helped: keeping packs of
vectors out of the stack (2x on the second order), transposing rows of losses in registers (16 us of 51), no integer
division in front of panels, sign tricks in softplus (13%). What did not: a reciprocal estimate instead of the division,
5 x 5 instead of 5 x 4 blocks in phi's sums, malloc tuning.

Later, predicted and measured in us:

- Activations kept in recycled memory: 0 to 80 of 250 at (1024, 11). In some heap layouts malloc trims its heap at every
  step, and 25 page faults follow; that was the larger part of the spread between runs.
- Sums for phi folded over their lanes tile by tile, instead of 36 KB of lane sums: -14 of 30 predicted, -5 measured at
  (1024, 11), since short loops and not the cache are the limit; -1 of 2.5 at (64, 4), where clearing and folding the
  lane sums was most of it.
- The network as a string instead of int[], an op without phi's part: -1.2 of 25 a Hessian product, -1.0 measured.
- Checks in Python: 1.8 in a loop of their own, 8 within a step. Half of that is gone; `expand` instead of `view`: -2.
- Rows of losses moved in pieces of 16 bytes: -2 of 25 a Hessian product at (1024, 11) predicted, -1.2 measured.
- Wide rows combined column by column instead of row by row: -10% with 64 units.
- The network's text without a copy that torch 2.13 loses at every call (48 to 85 bytes). A block lost between the
  tensors of each call pins malloc's heap, which in some layouts grew by 45 KB a call, all of it fresh pages: 48% of a
  second order at (1024, 11) and 68% at (64, 313) were the kernel's clearing of pages. In other layouts it grew little.
- Wide rows: the last columns as one block of four vectors that reaches back, where single vectors wait for their own
  sums, and prefetches only where a row is read first: -5% of each op at 313 losses.
- Fewer frames of Python, at (1024, 11): `backward` called by the engine itself -5.5, one function that asks what a
  pass wants -1.6, `phi[...]` instead of `expand` -1 to -2, `forward` straight to the op -1.5: 5.33 becomes 5.5 to 5.7.
- One unit: rows of the Hessian product written from end to end, not in columns of a tile, along which 64 fresh pages
  fault at a time: 0.93 to 0.97 becomes 0.99 to 1.03 at (16384, 2048). Of its 58 ms 51 are page faults, eager's too.
  Stores that pass by the cache make it worse (66 becomes 111 in fresh pages: clearing them has just brought them in).
- Sums for phi over 256 samples before their lanes are added up: second order with phi -20% with AVX2 (102 us becomes
  84 at (1024, 11)), -13% without, -3% with AVX-512, whose tiles are four times as large; more samples are worse again.
- Five frames of Python less, and no AttributeError (`Module.__getattr__` writes one before it finds a parameter): -3 of
  86 us at (64, 4), -3 of 215 at (1024, 11).
- Inputs held by ctx, with their versions, instead of `save_for_backward`: -8 of 215 at (1024, 11), -1 of 86 at (64, 4).
- Eight runs one after the other, quiet: (64, 4) 6.0 to 6.3 and 7.1 to 7.2, (64, 313) 4.9 to 5.1 and 5.5 to 5.7, (1024,
  11) 5.5 to 5.8 and 8.1 to 8.4, (65536, 4) 6.4 to 8.6 and 6.8 to 7.7. In a slow phase of the machine (350 instead of
  205 us at (1024, 11)) 4.8, 4.0, 4.7 and 7.8 in the left column.
- What is left at (1024, 11): 105 us in the two ops, where 94 would do with their data in the cache; of the rest a third
  is Python, torch's own included, that finds its code and objects gone from the cache after the kernels (libpython
  takes 45 us of a step at batch 64 and 84 at 1024). Activations computed again instead of kept: +20.
- Not done: a view of phi that is kept from call to call. -2%, but it keeps the AccumulateGrad node alive across steps
  and streams.
- No better: one Function for value and gradient whose second output is multiplied by torch (an empty one takes 90 us
  where an empty pair takes 85).
- No better: activations apart from the products (a vector takes 20 cycles either way, 3 of them the division), slope
  and product in one operation, phi's sums layer by layer within the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from eager import EagerCombiner, derivatives
from timing import interleaved

from auxfast.nn import NonlinearCombiner


def cases(combiner: NonlinearCombiner, batch: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name, for the fused and the eager combiner."""
    eager = EagerCombiner(combiner)
    losses = torch.rand(batch, combiner.num_losses)
    given = losses, torch.randn_like(losses)
    fused = derivatives(combiner, *given, list(combiner.parameters()))
    theirs = derivatives(eager, *given, list(eager.parameters()))
    timed = ("full", "Hessian")
    return {name: fused[name] for name in timed} | {f"{name}, eager": theirs[name] for name in timed}


def compare(benchmark: Any, batch: int, num_losses: int, hidden: tuple[int, ...], rounds: int) -> None:
    torch.manual_seed(0)
    functions = cases(NonlinearCombiner(num_losses, hidden), batch)
    fused, eager = functions["full"](), functions["full, eager"]()
    torch.testing.assert_close(fused[0], eager[0], rtol=1e-3, atol=1e-5 * float(eager[0].abs().max()))
    seconds = interleaved(functions, rounds=rounds if benchmark.enabled else 1, inner=None if benchmark.enabled else 1)
    benchmark.pedantic(functions["full"], rounds=3 if benchmark.enabled else 1)
    benchmark.extra_info |= {
        "full us": seconds["full"] * 1e6,
        "full, ratio": seconds["full, eager"] / seconds["full"],
        "Hessian us": seconds["Hessian"] * 1e6,
        "Hessian, ratio": seconds["Hessian, eager"] / seconds["Hessian"],
    }


@pytest.mark.benchmark(group="combiner, 5 hidden layers of 10, float32, one thread; ratio: times faster than torch.nn")
@pytest.mark.parametrize(("batch", "num_losses"), [(64, 4), (64, 313), (1024, 11), (65536, 4)])
def test_combiner(benchmark: Any, batch: int, num_losses: int) -> None:
    compare(benchmark, batch, num_losses, (10,) * 5, rounds=30)


@pytest.mark.benchmark(group="combiner, the corners of what the kernels cover, float32, one thread")
@pytest.mark.parametrize("hidden", [(1,), (10,), (64,), (1,) * 8, (64,) * 8], ids=lambda h: f"{len(h)}x{h[0]}")
@pytest.mark.parametrize(("batch", "num_losses"), [(1, 1), (16, 2), (256, 40), (256, 64), (64, 2048), (16384, 2048)])
def test_combiner_corners(benchmark: Any, batch: int, num_losses: int, hidden: tuple[int, ...]) -> None:
    if not benchmark.enabled and batch * num_losses * len(hidden) > 1e6:
        batch //= 64  # a smoke test does not need the minutes that the large corners take
    compare(benchmark, batch, num_losses, hidden, rounds=7)
