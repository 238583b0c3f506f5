"""Configurations as plain tables, which TOML and JSON can hold; and changes to some of their entries."""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from auxfast import solvers
from auxfast.solvers import Preconditioner, Solver
from auxfast.train.optimizers import Component

SOLVERS = {
    kind.__name__: kind
    for kind in (
        solvers.Neumann,
        solvers.Chebyshev,
        solvers.ConjugateGradient,
        solvers.MINRES,
        solvers.Nystrom,
        solvers.Dense,
        solvers.Identity,
    )
}
PRECONDITIONERS = {kind.__name__: kind for kind in (solvers.Jacobi, solvers.Nystrom)}
_NAMED: dict[Any, Mapping[str, type]] = {Solver: SOLVERS, Preconditioner: PRECONDITIONERS}
_NOT_IN_TABLES = "diagonal"  # Jacobi's: tensors

Config = TypeVar("Config")
Changes = Sequence[tuple[tuple[str, ...], Any]]  # (path below this entry, value), in the order in which they are made


def to_table(value: Any) -> Any:
    """Dataclasses as dicts (components and solvers with their `name`), tuples as lists, all else as it is."""
    if isinstance(value, Component) or type(value) in {*SOLVERS.values(), *PRECONDITIONERS.values()}:
        return {key: to_table(entry) for key, entry in _entries(value).items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_table(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: to_table(entry) for key, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [to_table(entry) for entry in value]
    return value


def override(config: Config, changes: Mapping[str, Any]) -> Config:
    """`config`, a frozen dataclass, with some entries changed.

    Args:
        changes: dotted keys, or nested tables: {"train": {"inner_steps": 5}, "task.shots": 3}. A component or solver is
            replaced as a whole by a table with a `name`, and changed entry by entry by one without, or by keys such
            as "train.solver.steps". What may be None may be "none", for TOML has no null.

    Raises:
        ValueError: an unknown key, or a value of a wrong type or out of range; names the key, and says what was given
            and what is allowed.
    """
    changed: Config = _dataclass(config, [(tuple(key.split(".")), value) for key, value in changes.items()], "")
    return changed


def flattened(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables by dotted keys: {"train": {"inner_steps": 5}} as {"train.inner_steps": 5}."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat.update(flattened(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return flat


def _dataclass(base: Any, changes: Changes, key: str) -> Any:
    """All entries at once: a dataclass checks how they fit together."""
    hints = get_type_hints(type(base))
    by_field: dict[str, list[tuple[tuple[str, ...], Any]]] = {}
    for path, value in changes:
        if not path and not isinstance(value, Mapping):
            raise _wrong(key, value, "a table")
        below = [(path, value)] if path else [(tuple(name.split(".")), entry) for name, entry in value.items()]
        for (name, *rest), entry in below:
            if name not in hints:
                raise ValueError(f"{_join(key, name)}: no such entry, must be one of {', '.join(hints)}")
            by_field.setdefault(name, []).append((tuple(rest), entry))
    new = {name: _entry(getattr(base, name), hints[name], own, _join(key, name)) for name, own in by_field.items()}
    return replace(base, **new)


def _entry(base: Any, hint: Any, changes: Changes, key: str) -> Any:
    kinds = _alternatives(hint)
    if is_dataclass(base) and not isinstance(base, Component) and not set(kinds) & _NAMED.keys():
        return _dataclass(base, changes, key)
    if hint is Any and any(value is not None for _, value in changes):
        raise ValueError(f"{key}: this experiment has no options of its own")
    for path, value in changes:
        if not path and (value is None or value == "none") and (type(None) in kinds or hint is Any):
            base = None
        elif Component in kinds or set(kinds) & _NAMED.keys():
            base = _named(base, kinds, path, value, key)
        elif get_origin(hint) is Mapping:
            base = _mapping(base, path, value, key)
        elif path:
            raise ValueError(f"{'.'.join((key, *path))}: no such entry, {key} has no entries")
        else:
            base = _value(hint, value, key)
    return base


def _named(base: Any, kinds: Sequence[Any], path: Sequence[str], value: Any, key: str) -> Any:
    """A component, solver or preconditioner, changed."""
    known: Mapping[str, type] = next((_NAMED[kind] for kind in kinds if kind in _NAMED), {})
    if not path and isinstance(value, tuple(known.values()) or Component):
        return value
    entries = {} if base is None else _entries(base)
    if not path:
        table = {"name": value} if isinstance(value, str) else value
        if not isinstance(table, Mapping):
            raise _wrong(key, value, 'a table {name = "...", ...}')
        entries = dict(table) if "name" in table else {**entries, **table}
    elif path[0] == "name":
        entries = entries if entries.get("name") == value else {"name": value}
    elif len(path) == 1:
        entries[path[0]] = value
    else:
        entries[path[0]] = _named(entries.get(path[0]), (Preconditioner,), path[1:], value, _join(key, path[0]))
    name = entries.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f'{key}: got no name, must be a table {{name = "...", ...}}')
    if Component in kinds:
        return Component(name, {option: _tupled(given) for option, given in entries.items()})
    if name not in known:
        raise ValueError(f"{key}.name: got {name!r}, must be one of {', '.join(known)}")
    types = get_type_hints(known[name])
    hints = {field.name: types[field.name] for field in fields(known[name]) if field.name != _NOT_IN_TABLES}
    for option in entries:
        if option not in hints:
            raise ValueError(f"{key}.{option}: not an option of {name}, which has {', '.join(hints)}")
    options = {
        option: _entry(None, hints[option], [((), given)], f"{key}.{option}") for option, given in entries.items()
    }
    try:
        return known[name](**options)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error


def _entries(value: Any) -> dict[str, Any]:
    """Of a component, solver or preconditioner, its name among them."""
    if isinstance(value, Component):
        return {"name": value.name, **value.options}
    own = {f.name: getattr(value, f.name) for f in fields(value) if f.name != _NOT_IN_TABLES}
    return {"name": type(value).__name__, **own}


def _mapping(base: Mapping[str, Any], path: Sequence[str], value: Any, key: str) -> dict[str, Any]:
    """Tables without a type, such as {"equal": {"auxiliary_weight": 0.2}}."""
    if path:
        below = base.get(path[0], {})
        if path[1:]:
            value = _mapping(below if isinstance(below, Mapping) else {}, path[1:], value, _join(key, path[0]))
        return {**base, path[0]: _tupled(value)}
    if not isinstance(value, Mapping):
        raise _wrong(key, value, "a table")
    for name, entry in value.items():
        base = _mapping(base, tuple(name.split(".")), entry, key)
    return dict(base)


def _value(hint: Any, value: Any, key: str) -> Any:
    """`value` as the type that it should have."""
    for kind in _alternatives(hint):
        origin, parts = get_origin(kind), get_args(kind)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            return float(value)
        if isinstance(kind, type) and isinstance(value, kind) and isinstance(value, bool) == (kind is bool):
            return value
        if origin is Literal and any(value == part and type(value) is type(part) for part in parts):
            return value
        if origin is tuple and isinstance(value, (list, tuple)):
            hints = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
            if len(hints) == len(value):
                return tuple(_value(part, entry, key) for part, entry in zip(hints, value, strict=True))
    raise _wrong(key, value, _describe(hint))


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _describe(hint: Any) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string", type(None): '"none"'}
    texts = []
    for kind in _alternatives(hint):
        parts = [part for part in get_args(kind) if part is not Ellipsis]
        if get_origin(kind) is Literal:
            texts += [f'"{part}"' for part in parts]
        elif get_origin(kind) is tuple:
            texts.append("a list, each entry " + _describe(parts[0]))
        else:
            texts.append(names.get(kind, str(kind)))
    return " or ".join(texts)


def _tupled(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _wrong(key: str, value: Any, allowed: str) -> ValueError:
    return ValueError(f"{key}: got {value!r}, must be {allowed}")


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name
