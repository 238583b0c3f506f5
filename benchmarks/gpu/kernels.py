"""Each kernel in a large size, for a profiler that counts: the second round of calls, when all is loaded.

ncu --profile-from-start off -k regex:auxfast --kernel-name-base demangled python -m benchmarks.gpu.kernels
"""

from __future__ import annotations

import argparse

import torch

from benchmarks.gpu.operators import combiner_calls, loss_image_calls
from benchmarks.gpu.vectors import conjugate_gradients, minres, neumann
from benchmarks.networks import resnet18_shapes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.kernels", description=__doc__)
    parser.add_argument("--small", action="store_true", help="small sizes: does it run?")
    small = parser.parse_args().small
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes, entries = ([(10, 10)], 1000) if small else (resnet18_shapes(), 1 << 24)
    combiner = combiner_calls("auxfast", 64 if small else 1 << 18, 11, device, seed=0)
    loss_image = loss_image_calls("auxfast", (1, 3, 8, 16) if small else (4, 3, 512, 1024), device)
    calls = [combiner["full"], combiner["Hessian"], loss_image["full"], loss_image["Hessian"]]
    calls += [
        neumann(shapes, device, steps=1),
        *(make(entries, device, steps=1) for make in (conjugate_gradients, minres)),
    ]
    for is_counted in (False, True):
        if device.type == "cuda":
            torch.cuda.synchronize()
            if is_counted:
                torch.cuda.profiler.start()
        for call in calls:
            call()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
