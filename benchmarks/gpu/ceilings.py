"""What this machine can do at most, measured in the same run as all else."""

from __future__ import annotations

import torch

from benchmarks.gpu.section import Call, Section, nvidia_smi


def ceilings(section: Section) -> None:
    """Copies of 4 GB, matrix products of 8192, one launch, a small matrix product, and what the host takes for nothing:
    eager figures of small networks are made of the last ones."""
    device, elements, side = section.device, 1 << (16 if section.small else 30), 64 if section.small else 8192
    if section.timer.on_gpu:
        properties = torch.cuda.get_device_properties(device)
        section.note("driver", nvidia_smi("name,driver_version"))
        section.note("L2 bytes", properties.L2_cache_size)
        section.note("multiprocessors", properties.multi_processor_count)

    def copy(_: int) -> Call:
        source = torch.ones(elements, device=device)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)

    section.compare("copy", {"torch": copy}, graph=False, launches=False)
    section.note("copy, TB/s", 8e-6 * elements / section.figures["copy"]["torch"]["eager us"])

    square = torch.randn(side, side, device=device)
    allowed = torch.backends.cuda.matmul.allow_tf32
    for name, tf32 in (("fp32", False), ("TF32", True)):
        torch.backends.cuda.matmul.allow_tf32 = tf32
        section.compare(f"matmul, {name}", {"torch": lambda _: lambda: square @ square}, graph=False, launches=False)
        torch.backends.cuda.matmul.allow_tf32 = allowed
        section.note(
            f"matmul, {name}, TFLOP/s", 2e-6 * side**3 / section.figures[f"matmul, {name}"]["torch"]["eager us"]
        )

    number = torch.zeros(1, device=device)
    section.compare("a launch (add_)", {"torch": lambda _: lambda: number.add_(1)}, launches=False)
    a, b = torch.randn(64, 128, device=device), torch.randn(128, 128, device=device)
    section.compare("a matrix product of 64 x 128 x 128", {"torch": lambda _: lambda: a @ b}, launches=False)

    def loop() -> int:
        total = 0
        for i in range(1000):
            total += i
        return total

    # A view's backward pass launches nothing: what is left is autograd, and on a GPU the hand-over to its thread.
    leaves = [torch.zeros(1, device=kind, requires_grad=True) for kind in ("cpu", device)]
    on_cpu, on_device = ((leaf.view(1, 1), leaf, torch.ones(1, 1, device=leaf.device)) for leaf in leaves)
    for name, call in {
        "1000 additions in Python": loop,
        "an empty tensor": lambda: torch.empty(0, device=device),
        "autograd without work, CPU": lambda: torch.autograd.grad(*on_cpu, retain_graph=True),
        "autograd without work": lambda: torch.autograd.grad(*on_device, retain_graph=True),
    }.items():
        section.compare(name, {"host": lambda _, call=call: call}, graph=False, launches=False)
