"""The account of what was built, and the choice between kernels and reference."""

from __future__ import annotations

import contextvars
import importlib.util
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import no_kernels
import pytest
import torch

import auxfast
from auxfast import _native, reference_kernels
from auxfast._native import use_native
from auxfast.ops.combiner import combiner
from auxfast.ops.network import CombinerNetwork

CPU = torch.device("cpu")


def test_build_info():
    info = auxfast.build_info()
    assert set(info) == {
        *["auxfast", "torch", "compiler", "cpu_kernels", "cpu_kernels_in_use"],
        *["cuda_kernels", "cuda_ptx", "cuda_toolkit", "cuda_driver", "cuda_available"],
    }
    assert (info["auxfast"], info["torch"]) == (auxfast.__version__, torch.__version__)
    assert isinstance(info["compiler"], str)
    assert info["cpu_kernels"][0] == "baseline"
    assert set(info["cpu_kernels"]) <= {"baseline", "avx2", "avx512"}
    assert info["cpu_kernels_in_use"] in info["cpu_kernels"]
    assert all(capability.isdigit() for capability in info["cuda_kernels"])
    assert set(info["cuda_ptx"]) <= set(info["cuda_kernels"])
    assert (info["cuda_toolkit"] is None) == (info["cuda_kernels"] == []) == (info["cuda_ptx"] == [])
    assert info["cuda_available"] == torch.cuda.is_available()


def test_build_info_is_the_callers_own():
    auxfast.build_info().clear()
    assert auxfast.build_info()["auxfast"] == auxfast.__version__


def test_kernels_by_device():
    assert use_native(CPU)
    assert not use_native(torch.device("meta"))
    info = auxfast.build_info()
    if not (info["cuda_kernels"] and info["cuda_available"]):
        assert not use_native(torch.device("cuda"))
        assert not use_native(torch.device("cuda:0"))


def test_reference_kernels_switches_and_restores():
    with reference_kernels():
        assert not use_native(CPU)
        with reference_kernels():
            assert not use_native(CPU)
        assert not use_native(CPU)
    assert use_native(CPU)


def test_reference_kernels_restores_after_an_exception():
    with pytest.raises(KeyError), reference_kernels():
        raise KeyError
    assert use_native(CPU)


def test_reference_kernels_is_per_context():
    elsewhere = contextvars.copy_context()
    with reference_kernels():
        assert elsewhere.run(use_native, CPU)
        assert not contextvars.copy_context().run(use_native, CPU)


def test_reference_kernels_in_one_thread_is_not_in_another():
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with reference_kernels():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    thread.start()
    assert entered.wait(10)
    assert use_native(CPU)
    leave.set()
    thread.join()


@pytest.mark.parametrize("recorded_on_reference", [True, False])
def test_a_graph_keeps_what_it_was_recorded_with(recorded_on_reference):
    network = CombinerNetwork(2, (3,))
    losses = torch.rand(4, 2, requires_grad=True)
    phi = torch.rand(network.num_parameters)

    def third_derivative(value: torch.Tensor) -> None:
        for _ in range(3):
            (gradient,) = torch.autograd.grad(value, losses, create_graph=True)
            value = gradient.square().sum()

    if recorded_on_reference:
        with reference_kernels():
            value = combiner(losses, phi, network)
        third_derivative(value)
    else:
        value = combiner(losses, phi, network)
        with reference_kernels(), pytest.raises(RuntimeError, match="a third"):
            third_derivative(value)


def _load_again() -> ModuleType:
    """Another `_native`, loaded from the same file."""
    spec = importlib.util.spec_from_file_location("auxfast.another_native", _native.__file__)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def _no_native_module(monkeypatch):
    monkeypatch.delattr(auxfast, "_C")
    monkeypatch.setitem(sys.modules, "auxfast._C", None)


@pytest.mark.usefixtures("_no_native_module")
def test_a_missing_native_module_says_how_to_build_it(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(_native.__file__).parents[1])])
    with pytest.raises(ImportError, match=r"native module could not be loaded .*pip install \.`\.$"):
        _load_again()


@pytest.mark.usefixtures("_no_native_module")
@pytest.mark.parametrize("module", ["_C.cpython-311-x86_64-linux-gnu.so", "_C.py"])
def test_a_source_tree_that_hides_an_installed_auxfast_says_so(monkeypatch, tmp_path, module):
    (tmp_path / "auxfast").mkdir()
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "auxfast/_C.pyi").touch()
    with pytest.raises(ImportError) as raised:
        _load_again()
    assert str(tmp_path) not in str(raised.value)
    (tmp_path / "auxfast" / module).touch()
    with pytest.raises(
        ImportError, match=rf"auxfast hides the auxfast in {tmp_path}/auxfast: started in another folder"
    ):
        _load_again()


def _load_with(monkeypatch: pytest.MonkeyPatch, native: Any) -> ModuleType:
    """Another `_native`, with that in the place of the native module."""
    monkeypatch.setattr(auxfast, "_C", native)
    monkeypatch.setitem(sys.modules, "auxfast._C", native)
    return _load_again()


def test_without_kernels_all_devices_are_on_the_reference(monkeypatch):
    module = _load_with(monkeypatch, no_kernels)
    assert not module.use_native(CPU)
    assert not module.use_native(torch.device("cuda"))
    info = module.build_info()
    assert set(info) == set(auxfast.build_info())
    assert (info["cpu_kernels"], info["cuda_kernels"]) == ([], [])
    assert info["compiler"].endswith("AUXFAST_BUILD=none, so every op runs on the PyTorch reference")


@dataclass
class _Machine:
    """A machine with GPUs, as torch and the native module would tell of it. Every question about a GPU is noted.

    Attributes:
        capabilities: of its GPUs.
        driver: the newest CUDA that the driver knows, as CUDA numbers it.
        kernels, ptx, toolkit: what auxfast was built for, and with.
        current: index of the current GPU.
    """

    monkeypatch: pytest.MonkeyPatch
    capabilities: list[tuple[int, int]]
    driver: int = 13000
    kernels: str = "75 80 90 100 120"
    ptx: str = "100 120"
    toolkit: str = "13.0"
    current: int = 0

    def __post_init__(self) -> None:
        self.asked: list[torch.device] = []
        built = {
            "cpu_kernels": ["baseline"],
            "cuda_kernels": self.kernels.split(),
            "cuda_ptx": self.ptx.split(),
            "cuda_toolkit": self.toolkit,
        }
        fakes: dict[str, Callable[..., Any]] = {
            "is_available": lambda: bool(self.capabilities),
            "current_device": lambda: self.current,
            "get_device_capability": self._capability,
            "get_device_name": lambda device: f"GPU {device.index}",
        }
        for name, fake in fakes.items():
            self.monkeypatch.setattr(torch.cuda, name, fake)
        self.monkeypatch.setattr(torch.version, "hip", None)
        self.monkeypatch.setattr(torch.version, "cuda", "12.8")
        native = SimpleNamespace(build_info=lambda: dict(built), cuda_driver_version=lambda: self.driver)
        self.use_native = _load_with(self.monkeypatch, native).use_native

    def _capability(self, device: torch.device) -> tuple[int, int]:
        self.asked.append(device)
        return self.capabilities[device.index]


FIRST_GPU = torch.device("cuda:0")


@pytest.mark.parametrize(
    "capability",
    [(7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (11, 0), (12, 0), (12, 1), (13, 0)],
    ids=str,
)
def test_code_runs_on_its_capability_and_later_minor_ones_and_ptx_on_all_later_ones(capability, monkeypatch):
    machine = _Machine(monkeypatch, [capability])
    assert machine.use_native(FIRST_GPU)
    assert machine.use_native(CPU)


@pytest.mark.parametrize(
    ("machine", "why"),
    [
        (
            {"capabilities": [(7, 0)]},
            "it has compute capability 7.0, and this build is for 7.5, 8.0, .* there are none",
        ),
        ({"capabilities": [(8, 0)], "kernels": "86 90", "ptx": "90"}, "compute capability 8.0, .* older ones there"),
        ({"capabilities": [(11, 0)], "ptx": "120"}, "compute capability 11.0, .*: build it with a newer CUDA toolkit"),
        ({"capabilities": [(9, 0)], "driver": 12090}, "knows CUDA 12.9, .*with CUDA 13.0, needs 13.0: .*torch's 12.8"),
        ({"capabilities": [(9, 0)], "driver": 0}, "driver knows CUDA 0.0"),
        ({"capabilities": [(11, 0)], "driver": 13000, "toolkit": "13.1"}, "with CUDA 13.1, needs 13.1: update"),
        ({"capabilities": [(9, 0)], "kernels": "", "ptx": ""}, "this build has none: install auxfast where .* nvcc"),
    ],
    ids=["too old", "between", "no PTX", "old driver", "no driver", "PTX that the driver cannot compile", "no nvcc"],
)
def test_a_gpu_that_cannot_run_the_kernels_is_on_the_reference_with_one_warning(machine, why, monkeypatch):
    machine = _Machine(monkeypatch, **machine)
    with pytest.warns(RuntimeWarning, match=rf"on cuda:0 \(GPU 0\), which is slower: .*{why}") as given:
        assert not machine.use_native(FIRST_GPU)
    assert given[0].filename == __file__
    assert not machine.use_native(FIRST_GPU)
    assert machine.use_native(CPU)


def test_code_runs_under_an_older_driver_of_its_major_version(monkeypatch):
    assert _Machine(monkeypatch, [(9, 0)], driver=13000, toolkit="13.2").use_native(FIRST_GPU)


def test_a_torch_for_rocm_has_no_kernels(monkeypatch):
    machine = _Machine(monkeypatch, [(9, 4)])
    monkeypatch.setattr(torch.version, "hip", "7.1")
    with pytest.warns(RuntimeWarning, match=r"since this torch is built for ROCm 7\.1, and the kernels are for CUDA"):
        assert not machine.use_native(FIRST_GPU)
    assert machine.asked == []


def test_each_gpu_is_asked_once_and_only_when_a_tensor_of_it_comes(monkeypatch):
    machine = _Machine(monkeypatch, [(9, 0), (7, 0)])
    assert machine.use_native(CPU)
    assert machine.asked == []
    for _ in range(3):
        assert machine.use_native(FIRST_GPU)
    assert machine.asked == [FIRST_GPU]
    second = torch.device("cuda:1")
    with pytest.warns(RuntimeWarning, match="on cuda:1"):
        assert not machine.use_native(second)
    assert not machine.use_native(second)
    assert machine.asked == [FIRST_GPU, second]


def test_cuda_without_an_index_is_the_current_gpu(monkeypatch):
    machine = _Machine(monkeypatch, [(9, 0), (7, 0)])
    for machine.current in (0, 1, 0):
        assert machine.use_native(torch.device("cuda")) == (machine.current == 0)


@pytest.mark.cuda
def test_the_kernels_run_on_this_gpu():
    assert use_native(torch.device("cuda"))
    assert use_native(FIRST_GPU)
    assert auxfast.build_info()["cuda_driver"]


@pytest.mark.cuda
def test_a_gpu_can_be_asked_while_a_graph_is_captured():
    fresh = _load_again()
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.zeros(1, device="cuda")  # torch warns of a graph without work
        assert fresh.use_native(FIRST_GPU)
