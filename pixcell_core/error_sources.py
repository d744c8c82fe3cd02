"""Finds every error code in the source by reading it as syntax: what a person can meet, where, with which exit code.

A code stands as `code="…"` in a call, as `default_code` of an error class, in the place of a parameter or a field named
`code`, as the first of a returned pair of code and reason, or in a table of tuples that a loop hands on as `code`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("pixcell_core", "privacy_audit", "site_client", "server", "deploy")
ONE_WORD = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
SEVERAL_WORDS = re.compile(r"[a-z0-9]+(-[a-z0-9]+)+")
NO_ERRORS = frozenset({"ok", "connected", "starting", "stopped"})
"""Words in a code's place that say that all is well."""


@dataclass
class Found:
    """One code: the rooms that say it, in the order of the files, and the exit codes of the errors that carry it."""

    code: str
    rooms: list[str] = field(default_factory=list)
    exits: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _Class:
    bases: tuple[str, ...]
    exit_code: int | None
    default_code: str | None


def codes_in(root: Path) -> dict[str, Found]:
    """Every code in the packages below `root`, by code. Nothing is imported."""
    trees = {
        path: ast.parse(path.read_text(encoding="utf-8"))
        for package in PACKAGES
        for path in sorted((root / package).rglob("*.py"))
    }
    classes = {
        node.name: _class(node)
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    places = {path: _places_named_code(tree, classes) for path, tree in trees.items()}
    everywhere = {name: place for own in places.values() for name, place in own.items()}
    found: dict[str, Found] = {}
    for path, tree in trees.items():
        room = "/".join(path.relative_to(root).parts[:2]).removesuffix(".py")
        for code, exit_code in _in_file(tree, everywhere | places[path], set(places[path]), classes):
            if code in NO_ERRORS or not ONE_WORD.fullmatch(code):
                continue
            entry = found.setdefault(code, Found(code))
            if room not in entry.rooms:
                entry.rooms.append(room)
            if exit_code is not None:
                entry.exits.add(exit_code)
    return found


def _class(node: ast.ClassDef) -> _Class:
    values: dict[str, object] = {}
    for part in node.body:
        target = part.targets[0] if isinstance(part, ast.Assign) else getattr(part, "target", None)
        value = getattr(part, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Constant):
            values[target.id] = value.value
    exit_code, default = values.get("exit_code"), values.get("default_code")
    return _Class(
        tuple(_last(base) for base in node.bases),
        exit_code if isinstance(exit_code, int) else None,
        default if isinstance(default, str) else None,
    )


def _exit_of(name: str, classes: dict[str, _Class]) -> int | None:
    """The exit code of an error class; None for what is no error."""
    own = classes.get(name)
    if own is None:
        return None
    if own.exit_code is not None:
        return own.exit_code
    inherited = [_exit_of(base, classes) for base in own.bases]
    return next((code for code in inherited if code is not None), None)


def _default_of(name: str, classes: dict[str, _Class]) -> str | None:
    own = classes.get(name)
    if own is None:
        return None
    inherited = (_default_of(base, classes) for base in own.bases)
    return own.default_code or next((code for code in inherited if code), None)


@dataclass(frozen=True)
class _Place:
    """Where in a call the code stands, and the exit code of the error that the function makes of it."""

    index: int
    exit_code: int | None


def _in_file(
    tree: ast.Module, places: dict[str, _Place], own: set[str], classes: dict[str, _Class]
) -> Iterator[tuple[str, int | None]]:
    """Codes of one file; a place that another file defined counts for words with a hyphen alone."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and (kind := classes[node.name]).default_code:
            yield kind.default_code, _exit_of(node.name, classes)
        elif isinstance(node, ast.Call):
            yield from _in_call(node, places, own, classes)
        elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 2:
            for text in _texts(node.value.elts[0]):
                if SEVERAL_WORDS.fullmatch(text):
                    yield text, None
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _in_function(node, classes)


def _in_call(
    call: ast.Call, places: dict[str, _Place], own: set[str], classes: dict[str, _Class]
) -> Iterator[tuple[str, int | None]]:
    name = _last(call.func)
    exit_code = _exit_of(name, classes)
    named = next((k.value for k in call.keywords if k.arg == "code"), None)
    if named is not None:
        for text in _texts(named):
            yield text, exit_code
    elif exit_code is not None and any(k.arg == "hint" for k in call.keywords):
        if (default := _default_of(name, classes)) is not None:
            yield default, exit_code
    elif name in places and len(call.args) > places[name].index:
        for text in _texts(call.args[places[name].index]):
            if name in own or SEVERAL_WORDS.fullmatch(text):
                yield text, places[name].exit_code


def _in_function(
    function: ast.FunctionDef | ast.AsyncFunctionDef, classes: dict[str, _Class]
) -> Iterator[tuple[str, int | None]]:
    """Defaults of a parameter `code`; the tuples of a table where a loop hands one of their texts on as `code`."""
    arguments = [*function.args.posonlyargs, *function.args.args]
    given = dict(zip([a.arg for a in reversed(arguments)], reversed(function.args.defaults), strict=False))
    given |= {a.arg: d for a, d in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True) if d}
    own_error = _exit_made(function, classes)
    if "code" in given:
        for text in _texts(given["code"]):
            yield text, own_error
    parameters = {a.arg for a in [*arguments, *function.args.kwonlyargs]}
    if "code" not in parameters and _code_calls(function):
        for node in ast.walk(function):
            if isinstance(node, ast.Tuple):
                for element in node.elts:
                    for text in _texts(element):
                        if SEVERAL_WORDS.fullmatch(text):
                            yield text, own_error


def _code_calls(function: ast.AST) -> list[ast.Call]:
    """Calls that hand on a name as `code`."""
    return [
        node
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and any(k.arg == "code" and isinstance(k.value, ast.Name) for k in node.keywords)
    ]


def _exit_made(function: ast.AST, classes: dict[str, _Class]) -> int | None:
    """The exit code of the error that a function makes of a code it hands on."""
    exits = [_exit_of(_last(call.func), classes) for call in _code_calls(function)]
    return next((code for code in exits if code is not None), None)


def _places_named_code(tree: ast.Module, classes: dict[str, _Class]) -> dict[str, _Place]:
    """For functions and data classes of a file: at which place of a call a `code` stands."""
    places: dict[str, _Place] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            names = [a.arg for a in node.args.args if a.arg not in ("self", "cls")]
            if "code" in names and not node.name.startswith("__"):
                places[node.name] = _Place(names.index("code"), _exit_made(node, classes))
        elif isinstance(node, ast.ClassDef):
            fields = [
                part.target.id
                for part in node.body
                if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name)
            ]
            if "code" in fields:
                places[node.name] = _Place(fields.index("code"), None)
    return places


def _texts(node: ast.AST) -> Iterator[str]:
    """The texts an expression can come to, as far as they stand in it."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from _texts(node.body)
        yield from _texts(node.orelse)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from _texts(value)
    elif isinstance(node, ast.Call):
        # str(envelope.get("code", "stage-failed")): what is said where nothing else is.
        for argument in node.args[-1:]:
            yield from (t for t in _texts(argument) if t != "code")


def _last(node: ast.AST) -> str:
    """`name` of `module.name`."""
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
