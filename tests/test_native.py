"""The account of what was built, and the choice between kernels and reference."""

from __future__ import annotations

import contextvars
import importlib.util
import sys
import threading
from pathlib import Path
from types import ModuleType

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
        *["cuda_kernels", "cuda_toolkit", "cuda_available"],
    }
    assert (info["auxfast"], info["torch"]) == (auxfast.__version__, torch.__version__)
    assert isinstance(info["compiler"], str)
    assert info["cpu_kernels"][0] == "baseline"
    assert set(info["cpu_kernels"]) <= {"baseline", "avx2", "avx512"}
    assert info["cpu_kernels_in_use"] in info["cpu_kernels"]
    assert all(capability.isdigit() for capability in info["cuda_kernels"])
    assert (info["cuda_toolkit"] is None) == (info["cuda_kernels"] == [])
    assert info["cuda_available"] == torch.cuda.is_available()


def test_build_info_is_the_callers_own():
    auxfast.build_info().clear()
    assert auxfast.build_info()["auxfast"] == auxfast.__version__


def test_kernels_by_device():
    assert use_native(CPU)
    assert not use_native(torch.device("meta"))
    assert use_native(torch.device("cuda")) == bool(auxfast.build_info()["cuda_kernels"])


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
    spec = importlib.util.spec_from_file_location("another_native", _native.__file__)
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


def test_without_kernels_all_devices_are_on_the_reference(monkeypatch):
    monkeypatch.setattr(auxfast, "_C", no_kernels)
    monkeypatch.setitem(sys.modules, "auxfast._C", no_kernels)
    module = _load_again()
    assert not module.use_native(CPU)
    assert not module.use_native(torch.device("cuda"))
    info = module.build_info()
    assert set(info) == set(auxfast.build_info())
    assert (info["cpu_kernels"], info["cuda_kernels"]) == ([], [])
    assert info["compiler"].endswith("AUXFAST_BUILD=none, so every op runs on the PyTorch reference")
