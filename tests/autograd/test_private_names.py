"""Every private name of torch that auxfast uses, why, and that answers are right where torch has it no more.

A name that torch has renamed looks like a name that auxfast has wrong: a program imports auxfast with one name changed
in its sources, and compares what it computes with what an unchanged auxfast does.
"""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "auxfast"
PROGRAM = Path(__file__).with_name("renamed.py")


class Name(NamedTuple):
    why: str
    instead: str


_RULE = "what a node saved is read once for a batch of vectors", "the engine, vector by vector"
_MODULE_HOOKS = "modules with hooks must run, others need not", "all modules run"
_VMAP = "torch.vmap of a node without its own frames, 60 us", "the engine, vector by vector"

_BATCH = "one solve for the rows of is_grads_batched", "an error: a backward pass for each row, or torch.func.vmap"

NAMES = {
    "_execution_engine": Name("torch.autograd.grad without its checks, an eighth of a product", "torch.autograd.grad"),
    "_forward_cls": Name("what a Function says of itself", "Functions prove their derivatives, run one by one"),
    "_backward_cls": Name("the engine calls backward itself, 6 us", "through torch's own two frames"),
    "_will_engine_execute_node": Name("phi's gradient only where it is asked for", "always"),
    "_are_functorch_transforms_active": Name("kernels know no transforms", "operations of PyTorch"),
    "_current_level": Name("kernels know no forward-mode AD", "operations of PyTorch"),
    "is_legacy_batchedtensor": Name("kernels' graphs take no batched gradients", "whether it has a storage"),
    "_op": Name("an op without a frame of Python", "with it"),
    "_weight_norm": Name("normalised weights in one operation", "in three"),
    "_parameters": Name("a parameter without Module.__getattr__, 1.5 us", "Module.__getattr__"),
    "_DisableFuncTorch": Name("copies of buffers outside of transforms", "a thread that is in none"),
    "_backward_hooks": Name("tensors and modules with hooks", "the engine, vector by vector; all modules run"),
    "_forward_hooks": Name(*_MODULE_HOOKS),
    "_forward_pre_hooks": Name(*_MODULE_HOOKS),
    "_backward_pre_hooks": Name(*_MODULE_HOOKS),
    "_input_metadata": Name("shapes and dtypes of gradients", "the engine, vector by vector"),
    "_raw_saved_": Name("saved tensors that hooks unpack, as in checkpoints", "the engine, vector by vector"),
    "_saved_alpha": Name(*_RULE),
    "_saved_beta": Name(*_RULE),
    "_saved_dim": Name(*_RULE),
    "_saved_exponent": Name(*_RULE),
    "_saved_grad_output": Name(*_RULE),
    "_saved_mat1": Name(*_RULE),
    "_saved_mat2": Name(*_RULE),
    "_saved_output": Name(*_RULE),
    "_saved_result": Name(*_RULE),
    "_saved_self": Name(*_RULE),
    "_saved_self_sym_sizes": Name(*_RULE),
    "_saved_threshold": Name(*_RULE),
    "_vmap_increment_nesting": Name(*_VMAP),
    "_vmap_decrement_nesting": Name(*_VMAP),
    "_add_batch_dim": Name(*_VMAP),
    "_remove_batch_dim": Name(*_VMAP),
    "_set_vmap_fallback_warning_enabled": Name("no warning of operators that vmap runs one by one", "the warning"),
    "_vmapmode_increment_nesting": Name(*_BATCH),
    "_vmapmode_decrement_nesting": Name(*_BATCH),
    "_get_current_graph_task_keep_graph": Name(
        "the recorded inner gradient is freed as saved tensors are", "it goes with its node"
    ),
    "_current_graph_task_id": Name(
        "batched passes within a backward pass", "the engine goes through vectors one by one, from the same answers"
    ),
    "_use_python_reducer": Name(
        "a call of DistributedDataParallel is that of its module", "an error: call the module that it wraps"
    ),
    "_saved_other": Name("a GradScaler's scale is told from a number like it", "an error asks for a loss without it"),
    "_scale": Name("a GradScaler's scale is told from a number like it", "an error asks for a loss without it"),
    "_refresh_per_optimizer_state": Name("no search for a GradScaler where there is none, 20 ms", "the search"),
    "_is_zerotensor": Name("zeros that torch knows to be zero are not added, 100 us", "they are added"),
    "_unsafe_preserve_version_counter": Name("tangents on parameters of graphs made before", "those graphs go stale"),
    "_set_fwd_grad_enabled": Name("constants of autograd have no tangents", "an error for those under no_grad"),
    "_is_view": Name("no graph of tangents, which would take as much memory again", "that graph"),
}
# Names without which nothing works, or that lead to those above.
LASTING = {
    "_is_fwd_grad_enabled": "tells what _set_fwd_grad_enabled has set",
    "_C": "the module of torch that has them",
    "_functorch": "likewise",
    "_autograd": "likewise",
    "_buffers": "where modules keep buffers: in every module that was ever pickled; no public name shows empty ones",
    "_parameters": "where modules keep parameters: likewise; parameters() takes ten times as long",
    "_modules": "where modules keep their parts: likewise; modules() takes four times as long",
    "_version": "counts what writes to a tensor: the notes on autograd's in-place checks name it",
}
ELSEWHERE = {"_version"}  # names that other rooms may use
NOT_OF_TORCH = {"_asdict", "_field_defaults", "_fields", "_getframe", "_make", "_replace", "_target"}


def _used(tree: ast.AST) -> set[str]:
    """Attributes that begin with an underscore, and such strings that getattr may be given; `_foreach_*` is documented
    by torch."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.alias):
            found.add(node.name)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return {name for name in found if re.fullmatch(r"_(?!foreach_)[A-Za-z]\w*|is_legacy_batchedtensor", name)}


def _own(tree: ast.AST) -> set[str]:
    """What a file defines, its objects' attributes included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return found


def test_private_names_stand_in_one_room_and_in_this_list():
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    room = {path: tree for path, tree in trees.items() if path.parent.name == "autograd"}
    here = set().union(*map(_used, room.values())) - set().union(*map(_own, room.values())) - NOT_OF_TORCH
    listed = {"_raw_saved_" if name.startswith("_raw_saved_") else name for name in here}
    assert listed == {*NAMES, *LASTING} - ELSEWHERE
    own = set().union(*map(_own, trees.values())) | NOT_OF_TORCH
    for path in trees.keys() - room.keys():
        attributes = {node.attr for node in ast.walk(trees[path]) if isinstance(node, ast.Attribute)}
        foreign = {name for name in attributes - own if re.match(r"_(?!_|foreach_)", name)}
        assert foreign <= ELSEWHERE, path


@pytest.fixture(scope="module")
def answers() -> dict[str, object]:
    command = [sys.executable, str(PROGRAM), *NAMES]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


def test_the_program_uses_what_it_is_about(answers):
    assert answers["batched"] == {"nothing": 1} | {name: answers["batched"][name] for name in NAMES}
    off = {name for name in NAMES if not answers["batched"][name]}
    assert off >= {name for name, about in NAMES.items() if about.instead == _RULE[1]}


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_right_without(name, answers):
    """The torch at hand has the name, so that only auxfast does without it."""
    assert answers["wrong"][name] == [], f"{NAMES[name].why}; instead: {NAMES[name].instead}"
