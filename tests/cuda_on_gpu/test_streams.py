"""The kernels run on torch's current stream, can be captured in a CUDA graph, and give the same bits on any stream."""

from __future__ import annotations

import pytest
import torch

from .cases import CASES, Case, assert_same_bits

pytestmark = [pytest.mark.cuda, pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())]

BUSY_CYCLES = 500_000_000  # about 0.3 s: what is launched behind that has been launched long before it runs


def test_kernels_wait_for_their_turn_on_the_current_stream(case: Case):
    """The inputs get their values on a stream that is busy: kernels elsewhere would read the old ones."""
    given, fresh = case.make(0, "cuda"), case.make(1, "cuda")
    wanted = case.run(*fresh)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        case.run(*fresh)  # loads the kernels and allocates, both of which may wait for the device
        stream.synchronize()
        torch.cuda._sleep(BUSY_CYCLES)  # private, and what torch's own tests of streams use
        for tensor, values in zip(given, fresh, strict=True):
            tensor.copy_(values)
        results = case.run(*given)
    assert not stream.query(), "something waited for the device"
    stream.synchronize()
    assert_same_bits(results, wanted)


def test_same_bits_on_streams_that_run_side_by_side(case: Case):
    given = [case.make(seed, "cuda") for seed in range(2)]
    wanted = [case.run(*tensors) for tensors in given]
    streams = [torch.cuda.Stream() for _ in given]
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        for stream, tensors in zip(streams, given, strict=True):
            with torch.cuda.stream(stream):
                results.append(case.run(*tensors))
    torch.cuda.synchronize()
    for i, result in enumerate(results):
        assert_same_bits(result, wanted[i % 2])


def test_captured_graph_replays_with_new_inputs(case: Case):
    given = case.make(0, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # torch asks for a few runs on a side stream before the capture
        for _ in range(3):
            case.run(*given)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = case.run(*given)
    for seed in (1, 2):
        fresh = case.make(seed, "cuda")
        for tensor, values in zip(given, fresh, strict=True):
            tensor.copy_(values)
        graph.replay()
        assert_same_bits(results, case.run(*fresh))
