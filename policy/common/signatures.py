"""Signatures of functions and classes, read from source, so that settings are checked without importing their part.

Importing a denoiser imports torch, which takes seconds. A misspelt setting should be reported before that.
"""

from __future__ import annotations

import ast
import collections.abc
import functools
import importlib
import importlib.util
import inspect
import pathlib
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

EMPTY = inspect.Parameter.empty
# Names that annotations are made of, besides aliases that a module defines itself.
NAMES = {
    **{name: getattr(typing, name) for name in ("Any", "Literal")},
    **{name: getattr(collections.abc, name) for name in ("Callable", "Mapping", "Sequence")},
    "Path": pathlib.Path,
}


@dataclass(frozen=True)
class Unread:
    """A default that is not a plain value, represented by its source."""

    source: str

    def __repr__(self) -> str:
        return self.source


@dataclass(frozen=True)
class Declaration:
    """A function or class as its source declares it.

    Attributes:
        signature: its parameters; an annotation that is not made of plain types becomes `Any`.
        doc: its docstring, and that of a class's `__init__`, or an empty string.
    """

    signature: inspect.Signature
    doc: str


def load(target: str) -> Any:
    """Import and return the object at `module:name`."""
    module, _, name = target.partition(":")
    return getattr(importlib.import_module(module), name)


def declaration_of(target: str | Callable[..., Any] | Declaration) -> Declaration:
    """Return the declaration of a function or class.

    Args:
        target: the function or class, its declaration, or its `module:name`, which is read from the module's source. A
            module without source, or one that does not define the name by a plain `def`, `class` or
            `from ... import`, is imported.

    Returns:
        Its declaration.

    Raises:
        ImportError: there is no such module.
        AttributeError: there is no such name in it.

    Example:
        >>> declaration_of("policy.diffusion.sampler:Sampler").signature.parameters["eta"].default
        0.0
    """
    if isinstance(target, Declaration):
        return target
    if isinstance(target, str):
        found = _declared(*target.split(":"))
        return _of_object(load(target)) if found is None else found
    return _of_object(target)


def _of_object(target: Any) -> Declaration:
    function = getattr(target, "func", target)  # unwrap a functools.partial
    hints = _hints(function.__init__ if inspect.isclass(function) else function)
    signature = inspect.signature(target)
    parameters = [p.replace(annotation=hints.get(name, Any)) for name, p in signature.parameters.items()]
    own_init = vars(function).get("__init__") if inspect.isclass(function) else None
    init_doc = inspect.cleandoc(getattr(own_init, "__doc__", None) or "")
    return Declaration(
        signature.replace(parameters=parameters), f"{inspect.getdoc(function) or ''}\n\n{init_doc}".strip()
    )


def _hints(function: Any) -> dict[str, Any]:
    """Return the type hints of a function; one that cannot be resolved, as under TYPE_CHECKING, becomes `Any`."""
    try:
        return typing.get_type_hints(function)
    except Exception:
        pass
    names = {**vars(typing), **NAMES, **getattr(function, "__globals__", {})}
    hints: dict[str, Any] = {}
    for name, annotation in getattr(function, "__annotations__", {}).items():
        try:
            # The evaluated source is of a function that was imported already.
            hints[name] = eval(annotation, names) if isinstance(annotation, str) else annotation
        except Exception:
            hints[name] = Any
    return hints


@dataclass(frozen=True)
class _Source:
    """A module that was parsed but not imported."""

    name: str
    package: str
    body: tuple[ast.stmt, ...]

    def statements(self) -> Iterator[ast.stmt]:
        """Yield the statements at the top level and in its `if` blocks, such as those for type checkers."""
        for node in self.body:
            yield node
            if isinstance(node, ast.If):
                yield from node.body

    def imported(self, name: str) -> tuple[str, str] | None:
        """Return the module and name that a top-level `from module import name` imports under this name, or None."""
        for node in self.statements():
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        base = "." * node.level + (node.module or "")
                        return importlib.util.resolve_name(base, self.package), alias.name
        return None

    def value(self, name: str) -> ast.expr | None:
        """Return the expression that a top-level name is set to, or None."""
        for node in self.statements():
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if any(isinstance(t, ast.Name) and t.id == name for t in targets):
                value = getattr(node, "value", None)
                return value if isinstance(value, ast.expr) else None
        return None


@functools.cache
def _source(module: str) -> _Source | None:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    path = pathlib.Path(spec.origin)
    stub = path.with_suffix(".pyi")  # lists the names of a package that imports them when they are first used
    tree = ast.parse((stub if stub.exists() else path).read_text(encoding="utf-8"))
    is_package = spec.submodule_search_locations is not None
    return _Source(module, module if is_package else module.rpartition(".")[0], tuple(tree.body))


def _declared(module: str, name: str) -> Declaration | None:
    source = _source(module)
    if source is None:
        return None
    for node in source.statements():
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _declaration(node, _function_parameters(source, node.args))
        if isinstance(node, ast.ClassDef) and node.name == name:
            parameters = _class_parameters(source, node)
            return None if parameters is None else _declaration(node, parameters, _init_doc(node))
    elsewhere = source.imported(name)
    return _declared(*elsewhere) if elsewhere else None


def _declaration(
    node: ast.FunctionDef | ast.ClassDef, parameters: list[inspect.Parameter], init_doc: str = ""
) -> Declaration:
    ordered = sorted(parameters, key=lambda parameter: parameter.kind)
    return Declaration(inspect.Signature(ordered), f"{ast.get_docstring(node) or ''}\n\n{init_doc}".strip())


def _init_doc(node: ast.ClassDef) -> str:
    """Return the docstring of a class's own `__init__`, which may be the one that describes the parameters."""
    inits = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
    return (ast.get_docstring(inits[0]) or "") if inits else ""


def _class_parameters(source: _Source, node: ast.ClassDef) -> list[inspect.Parameter] | None:
    """Return the parameters of the class's own `__init__` or of a dataclass's fields, or None if neither is found."""
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            return _function_parameters(source, part.args)[1:]
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return None
    parameters: dict[str, inspect.Parameter] = {}
    for base in reversed(node.bases):
        inherited = _resolved(source, ast.unparse(base))
        if inherited is None:
            return None
        parameters |= inherited.signature.parameters
    for part in node.body:
        if isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name) and _is_parameter(part):
            parameters[part.target.id] = inspect.Parameter(
                part.target.id,
                inspect.Parameter.KEYWORD_ONLY,
                default=_default(source, part.value),
                annotation=_annotation(source, part.annotation),
            )
    return list(parameters.values())


def _is_parameter(field: ast.AnnAssign) -> bool:
    """Return whether a dataclass's field is a parameter: no class variable, and not `field(init=False)`."""
    if "ClassVar" in ast.unparse(field.annotation):
        return False
    keywords = field.value.keywords if isinstance(field.value, ast.Call) else []
    return not any(k.arg == "init" and ast.unparse(k.value) == "False" for k in keywords)


def _resolved(source: _Source, name: str) -> Declaration | None:
    return _declared(source.name, name) if "." not in name else None


def _function_parameters(source: _Source, arguments: ast.arguments) -> list[inspect.Parameter]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults: list[ast.expr | None] = [None] * (len(positional) - len(arguments.defaults)) + [*arguments.defaults]
    kinds = inspect.Parameter
    parameters: list[tuple[ast.arg, Any, ast.expr | None]] = [
        (a, kinds.POSITIONAL_OR_KEYWORD, default) for a, default in zip(positional, defaults, strict=True)
    ] + [
        (a, kinds.KEYWORD_ONLY, default) for a, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg is not None:
        parameters.append((arguments.kwarg, kinds.VAR_KEYWORD, None))
    return [
        inspect.Parameter(
            argument.arg,
            kind,
            default=_default(source, default),
            annotation=_annotation(source, argument.annotation),
        )
        for argument, kind, default in parameters
    ]


def _default(source: _Source, node: ast.expr | None) -> Any:
    if node is None:
        return EMPTY
    try:
        return ast.literal_eval(node)
    except ValueError:
        pass
    match node:
        case ast.Name(id=name):
            if (value := source.value(name)) is not None:
                return _default(source, value)
            if elsewhere := source.imported(name):
                other = _source(elsewhere[0])
                if other is not None and (value := other.value(elsewhere[1])) is not None:
                    return _default(other, value)
        case ast.Attribute(value=ast.Name(id=owner), attr=name):  # default of a field of another settings class
            found = _declared(source.name, owner)
            if found and name in found.signature.parameters:
                return found.signature.parameters[name].default
        case ast.Call(func=ast.Name(id="field"), keywords=keywords):
            for keyword in keywords:
                if keyword.arg == "default":
                    return _default(source, keyword.value)
                match keyword:
                    case ast.keyword(arg="default_factory", value=ast.Lambda(body=body)):
                        return _default(source, body)
                    case ast.keyword(arg="default_factory", value=ast.Name(id="dict" | "list" | "tuple" as container)):
                        return {"dict": {}, "list": [], "tuple": ()}[container]
    return Unread(ast.unparse(node))


def _annotation(source: _Source, node: ast.expr | None) -> Any:
    """Return the type if it is made of plain types, `NAMES` and aliases of the same module, else `Any`."""
    if node is None:
        return Any
    names: dict[str, Any] = {}
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and part.id not in NAMES and not hasattr(typing, part.id):
            value = source.value(part.id)
            if value is not None:
                names[part.id] = _annotation(source, value)
    try:
        # The evaluated source is part of this package or of a module that the user named.
        return eval(ast.unparse(node), {**NAMES, **names})
    except Exception:
        return Any
