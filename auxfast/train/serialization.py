"""Configurations as plain tables, which TOML and JSON can hold; and changes to some of their entries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from auxfast import solvers
from auxfast.train.config import RunConfig
from auxfast.train.optimizers import Component

SOLVERS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        solvers.Neumann,
        solvers.Chebyshev,
        solvers.ConjugateGradient,
        solvers.MINRES,
        solvers.GMRES,
        solvers.NormalEquations,
        solvers.Nystrom,
        solvers.Dense,
        solvers.GradientFlow,
        solvers.Identity,
        solvers.OneStep,
        solvers.SingleLoop,
    )
}
PRECONDITIONERS: dict[str, type] = {kind.__name__: kind for kind in (solvers.Jacobi, solvers.Nystrom)}
_BY_NAME: dict[Any, Mapping[str, type]] = {solvers.Solver: SOLVERS, solvers.Preconditioner: PRECONDITIONERS}
_SOLVERS_AND_PRECONDITIONERS = {*SOLVERS.values(), *PRECONDITIONERS.values()}
_WORDS = {
    int: "an integer",
    float: "a number",
    bool: "true or false",
    str: "a string",
    dict: "a table",
    NoneType: '"none"',
}

Config = TypeVar("Config")


def to_table(value: Any) -> Any:
    """Dataclasses as dicts (components and solvers with their `name`), tuples as lists, all else as it is."""
    return _converter().unstructure(value)


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config`, a frozen dataclass, with some entries changed.

    Args:
        changes: dotted keys, or nested tables: {"train": {"inner_steps": 5}, "task.shots": 3}. A component or solver is
            replaced as a whole by a table with a `name`, and changed entry by entry by one without, or by keys such
            as "train.solver.steps". What may be None may be "none", for TOML has no null.

    Raises:
        ValueError: an unknown key, or a value of a wrong type or out of range; names the key, and says what was given
            and what is allowed.
        ModuleNotFoundError: cattrs is not installed.
    """
    table = _changed(config, type(config), (), changes, "")
    if isinstance(config, RunConfig):  # its task is of a type that the experiment chose
        if config.task is None and table["task"] not in (None, "none"):
            raise ValueError("task: this experiment has no options of its own")
        table["task"] = _structured(table["task"], type(config.task), "task")
    changed: Config = _structured(table, type(config), "")
    return changed


def flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables by dotted keys: {"train": {"inner_steps": 5}} as {"train.inner_steps": 5}."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat.update(flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _changed(entry: Any, hint: Any, path: Sequence[str], change: Any, key: str) -> Any:
    """The table `entry`, which is at `key` and of the type `hint`, with a change at the `path` below it."""
    named = _is_named(hint)
    if not path and (not isinstance(change, Mapping) or (named and "name" in change)):
        return change
    table = to_table(entry)  # copies it, and makes a table of what an earlier change gave as an object
    if table is None or (named and isinstance(table, str)):
        table = {} if table is None else {"name": table}
    if not isinstance(table, dict):
        if path:
            raise ValueError(f"{_join(key, path[0])}: no such entry, {key} has no entries")
        return change
    steps = [(list(path), change)] if path else [(name.split("."), value) for name, value in change.items()]
    for (name, *below), value in steps:
        if named and name == "name":  # the options of another component would not fit this one
            table = table if table.get("name") == value else {"name": value}
        else:
            hint_below = _hints(hint, table).get(name, Any)
            table[name] = _changed(table.get(name), hint_below, below, value, _join(key, name))
    return table


def _hints(hint: Any, table: Mapping[str, Any]) -> Mapping[str, Any]:
    """The types of the entries below a `table` of the type `hint`, as far as they are known."""
    kind = _known(hint).get(str(table.get("name"))) if _is_named(hint) else hint
    return get_type_hints(kind) if is_dataclass(kind) else {}


def _is_named(hint: Any) -> bool:
    """Whether a table of this type has a `name`: that of a component, solver or preconditioner."""
    return bool({Component, *_BY_NAME} & {*_alternatives(hint)})


def _known(hint: Any) -> Mapping[str, type]:
    """Solvers or preconditioners by name; nothing for a component."""
    return next((_BY_NAME[kind] for kind in _alternatives(hint) if kind in _BY_NAME), {})


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


# -------------------------------------------------------------------------------------------------- objects of tables


def _cattrs() -> Any:
    """The package cattrs. Only tables need it: a configuration that is made of objects trains without."""
    try:
        import cattrs
    except ModuleNotFoundError as error:
        message = "cattrs is not installed, and configurations in tables need it. Get it with: pip install cattrs"
        raise ModuleNotFoundError(message, name="cattrs") from error
    return cattrs


@cache
def _converter() -> Any:
    converter = _cattrs().Converter(forbid_extra_keys=True, unstruct_collection_overrides={tuple: list})
    converter.register_structure_hook_func(lambda hint: hint is not Any, _plain)
    for kind in (bool, int, float, str):  # cattrs would convert values of other types
        converter.register_structure_hook(kind, _plain)
    converter.register_structure_hook_func(_is_mapping, _mapping)
    converter.register_structure_hook_func(_is_named, _named)
    converter.register_structure_hook_factory(lambda hint: is_dataclass(hint) and hint is not Component, _dataclass)
    for named in (Component, *_SOLVERS_AND_PRECONDITIONERS):
        converter.register_unstructure_hook(named, _named_table)
    return converter


def _named_table(entry: Any) -> dict[str, Any]:
    if isinstance(entry, Component):
        return {"name": entry.name, **to_table(dict(entry.options))}
    if getattr(entry, "diagonal", None) is not None:
        raise ValueError("a table cannot hold Jacobi's diagonal, which is of tensors")
    return {"name": type(entry).__name__} | {name: to_table(getattr(entry, name)) for name in _options(type(entry))}


def _options(kind: type) -> list[str]:
    return [field.name for field in fields(kind) if (kind, field.name) != (solvers.Jacobi, "diagonal")]


class _Refused(ValueError):
    """A value that an entry, or its own entry `below`, cannot have. The message says why, without the key."""

    def __init__(self, message: str, below: str = "") -> None:
        super().__init__(message)
        self.below = below


def _dataclass(kind: type) -> Callable[[Any, Any], Any]:
    omitted = {"diagonal": _cattrs().override(omit=True)} if kind is solvers.Jacobi else {}
    make = _cattrs().gen.make_dict_structure_fn(kind, _converter(), **omitted)
    return lambda table, hint: make(_mapping(table, hint), hint)


def _mapping(value: Any, hint: Any) -> Any:
    if not isinstance(value, Mapping):
        raise _Refused(f"got {value!r}, must be a table")
    return _with_tuples(value) if _is_mapping(hint) else value


def _is_mapping(hint: Any) -> bool:
    return get_origin(hint) is Mapping


def _with_tuples(value: Any) -> Any:
    """Lists become tuples again, which TOML and JSON do not have."""
    if isinstance(value, Mapping):
        return {key: _with_tuples(entry) for key, entry in value.items()}
    return tuple(value) if isinstance(value, list) else value


def _named(value: Any, hint: Any) -> Any:
    """A component, or a solver or preconditioner of those that are known."""
    known = _known(hint)
    if value in (None, "none") and NoneType in _alternatives(hint):
        return None
    if isinstance(value, tuple(known.values()) or Component):
        return value
    table = {"name": value} if isinstance(value, str) else value
    if not isinstance(table, Mapping):
        raise _Refused(f'got {value!r}, must be a table {{name = "...", ...}}')
    name, options = table.get("name"), {key: entry for key, entry in table.items() if key != "name"}
    if not isinstance(name, str):
        names = f", of {', '.join(known)}" if known else ""
        raise _Refused(f'got no name, must be a table {{name = "...", ...}}{names}')
    if not known:
        return Component(name, _with_tuples(options))
    if name not in known:
        raise _Refused(f"got {name!r}, must be one of {', '.join(known)}", below="name")
    return _converter().structure(options, known[name])


def _plain(value: Any, hint: Any) -> Any:
    """A number, a string, a choice, or a tuple of such."""
    alternatives = _alternatives(hint)
    if NoneType in alternatives and value in (None, "none"):  # before a string that is "none"
        return None
    for kind in alternatives:
        origin, parts = get_origin(kind), get_args(kind)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if kind in _WORDS and isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
            return value
        if origin is Literal and any(value == part and type(value) is type(part) for part in parts):
            return value
        if origin is tuple and isinstance(value, (list, tuple)):
            hints = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
            if len(hints) == len(value):
                return tuple(_plain(entry, part) for entry, part in zip(value, hints, strict=True))
    raise _Refused(f"got {value!r}, must be {words(hint)}")


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def words(hint: Any) -> str:
    """Words for what an entry must be."""
    if get_origin(hint) is Literal:
        return " or ".join(f'"{choice}"' for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return f"a list, each entry {words(get_args(hint)[0])}"
    return _WORDS.get(get_origin(hint) or hint) or " or ".join(map(words, get_args(hint))) or str(hint)


def _structured(table: Any, kind: type, key: str) -> Any:
    """The object of a `kind` that the table at `key` describes."""
    try:
        return _converter().structure(table, kind)
    except (_Refused, _cattrs().ClassValidationError) as error:
        raise _explained(error, key) from error


def _explained(error: Any, key: str, within: type | None = None) -> Exception:
    """The error that tells of the first fault that cattrs found in the table at `key`, with the entry's own key."""
    cattrs = _cattrs()
    notes = [n for n in getattr(error, "__notes__", ()) if isinstance(n, cattrs.AttributeValidationNote)]
    key = _join(key, notes[0].name) if notes else key
    if isinstance(error, cattrs.ClassValidationError):
        return _explained(error.exceptions[0], key, error.cl)
    if isinstance(error, cattrs.ForbiddenExtraKeysError):
        unknown, known = _join(key, min(error.extra_fields)), ", ".join(_options(error.cl))
        if error.cl in _SOLVERS_AND_PRECONDITIONERS:
            return ValueError(f"{unknown}: not an option of {error.cl.__name__}, which has {known}")
        return ValueError(f"{unknown}: no such entry, must be one of {known}")
    if isinstance(error, _Refused):
        return ValueError(f"{_join(key, error.below) if error.below else key}: {error}")
    # A solver's check of its settings does not know their key; a configuration's check names it.
    without_key = within in _SOLVERS_AND_PRECONDITIONERS and isinstance(error, ValueError)
    return ValueError(f"{key}: {error}") if without_key else error
