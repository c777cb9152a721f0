"""Which options exist: the tree of names behind --model.ffn.gate, read from the constructors that take the values.

Config files and command line are checked against it before the parser sees them. That gives a misspelt key its nearest
neighbour and its file, forbids abbreviations, and lets classes be named shortly (--model MAE) wherever they stand on
the command line. Values and their types stay the parser's business.
"""

import ast
import difflib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from .allowed import OWN, check_import
from .configs import CLASS_LEVELS, Fragment, lookup, origin
from .errors import UserError

MOST_NAMES = 16  # that an error lists
BASE = "super().__init__"  # how a class of ours calls the constructor of its base


class Option(NamedTuple):
    """`--key value` of the command line; value None: none was given."""

    key: str
    value: str | None

    def __str__(self) -> str:
        return f"--{self.key}" if self.value is None else f"--{self.key}={self.value}"


class Tree:
    """The options of a command, given the config that says which classes are in use.

    Args:
        roots: names and types of the first level; a type is a mapping of names, a dataclass, or the base of a class
            that the user chooses, anything else is a plain value.
        config: the merged config files; classes named on the command line are entered, classes left out are too.
        fragments: the files, for messages.
        default_classes: the class of a dotted option that has options but no class.

    A class is imported only from the project's packages and from those in the config's `import`.
    """

    def __init__(
        self,
        roots: Mapping[str, Any],
        config: dict[str, Any],
        fragments: list[Fragment],
        default_classes: Mapping[str, str],
    ) -> None:
        self.roots, self.config, self.fragments, self.default_classes = roots, config, fragments, default_classes
        self.modules: list[str] = config.get("import") or []
        self.notes: list[str] = []
        self.replaced: list[str] = []
        self.typed: set[str] = set()

    def enter_classes(self, options: list[Option]) -> list[Option]:
        """Move `--model MAE` and its like from the command line into the config; returns the other options."""
        rest = []
        for option in sorted(options, key=lambda option: option.key.count(".")):  # a class before what is inside it
            key = option.key.removesuffix("+").removesuffix(".class_path")
            kind = self._kind(key, f"--{option.key}")
            if not is_base(kind) or option.value is None:
                rest.append(option)
            elif option.value in ("null", "None"):
                self._set(key, None)
            else:
                found = find_class(kind, option.value, f"--{key}", self.modules)
                self._set(f"{key}.class_path", import_path(found))
        for path, name in self.default_classes.items():
            if _class_of(self.config, path) is None and (
                any(option.key.startswith(f"{path}.") for option in rest) or _has_arguments(self.config, path)
            ):
                self._set(f"{path}.class_path", name)
        return [option for option in options if option in rest]  # in the order of the command line

    def answerable(self, questions: list[Option]) -> list[Option]:
        """`--help all` and `--model.help MAE` as the parser wants them; UserError for a class that is not there."""
        answers = []
        for key, value in questions:
            base = self.roots.get(key.removesuffix(".help"))
            if isinstance(base, type) and value is not None:
                found = find_class(base, value, f"--{key}", self.modules)
                value = import_path(found)
            answers.append(Option(key, None if key == "help" else value))
        return answers

    def check(self, options: list[Option]) -> None:
        """Raise UserError for the first name that does not exist, in the config or on the command line.

        Options that belong to a class which a later file or the command line replaced are left out, with a note.
        """
        self.typed = {option.key for option in options}
        for name, kind in self.roots.items():
            if is_base(kind):
                self._class_at(kind, name)
        self._walk(self.roots, self.config, "")
        for option in options:
            self._kind(option.key.removesuffix("+"), f"--{option.key}")
        if self.replaced:
            self.notes = [f"left out, as they belong to a class that was replaced: {', '.join(self.replaced)}"]

    def keys(self) -> list[str]:
        """All dotted options that the classes in use take."""
        return list(self._keys(self.roots, self.config, ""))

    def _set(self, key: str, value: Any) -> None:
        parts = key.split(".")
        node = self.config
        for depth, part in enumerate(parts[:-1]):
            inside = node.get(part)
            node[part] = inside if isinstance(inside, dict) else {"class_path": inside} if inside else {}
            node = node[part]
            if is_base(self._kind(".".join(parts[: depth + 1]), key)) and parts[depth + 1] != "class_path":
                node = node.setdefault("init_args", {})
        node[parts[-1]] = value

    def _kind(self, key: str, shown: str) -> Any:
        """The type at a dotted option; UserError where a part of it does not exist."""
        kind: Any = self.roots
        parts = key.split(".")
        for depth, part in enumerate(parts):
            path = ".".join(name for name in parts[:depth] if name not in CLASS_LEVELS)
            if part in ("class_path", *CLASS_LEVELS) and is_base(kind):
                continue
            names = self._names(kind, path)
            if names is None:
                return Any
            if part not in names:
                raise UserError(f"{shown} is not an option{self._advice(key, kind, path, names, shown[:2] == '--')}")
            kind = without_none(names[part])
        return kind

    def _names(self, kind: Any, path: str) -> Mapping[str, Any] | None:
        """Names and types below a type; None where anything goes."""
        if not is_base(kind):
            return parameters_of(kind) if is_dataclass(kind) else kind if isinstance(kind, Mapping) else None
        return parameters_of(self._class_at(kind, path))

    def _class_at(self, base: type, path: str) -> type:
        name = _class_of(self.config, path) or self.default_classes.get(path)
        if name is None:
            choices = ", ".join(class_names(base, self.modules))
            raise UserError(f"no {path} is named: give --{path} with one of {choices}, or a config file that names it")
        return find_class(base, name, self._where(f"{path}.class_path"), self.modules)

    def _walk(self, kind: Any, node: Any, path: str) -> None:
        if not isinstance(node, dict):
            if isinstance(kind, Mapping) and node is not None:
                raise UserError(f"{self._where(path)} is {str(node)[:60]!r}; give a group of options")
            return
        names = self._names(kind, path)
        if names is None:
            return
        inside = node
        if is_base(kind):
            inside = node.get("init_args") or {}
            for key in node.keys() - {"class_path", *CLASS_LEVELS}:
                raise UserError(f"{self._where(f'{path}.{key}')} is not an option; write it under {path}.init_args")
        for key in list(inside):
            child = f"{path}.{key}" if path else str(key)
            if key in names:
                if inside[key] is None and _refuses_none(names[key]) and child not in self.typed:
                    raise UserError(f"{self._where(child)} is left open; give it: --{child} VALUE")
                self._walk(without_none(names[key]), inside[key], child)
            elif is_base(kind) and self._replaced(kind, path, child):
                self.replaced.append(child)
                del inside[key]
            else:
                raise UserError(f"{self._where(child)} is not an option{self._advice(child, kind, path, names, False)}")

    def _replaced(self, base: type, path: str, child: str) -> bool:
        """Whether the file that gives an option gives it to another class than the one in use."""
        fragment = origin(self.fragments, child)
        try:
            name = lookup(fragment.content, f"{path}.class_path") if fragment else None
        except KeyError:
            return False
        return name is not None and find_class(base, name, path, self.modules) is not self._class_at(base, path)

    def _where(self, key: str) -> str:
        fragment = origin(self.fragments, key)
        return f"config file '{fragment.name}': {key}" if fragment else key

    def _advice(self, key: str, kind: Any, path: str, names: Mapping[str, Any], typed: bool) -> str:
        """The end of the sentence: of which class it is no option, and what it may have meant."""
        of = f" of {self._class_at(kind, path).__name__}" if is_base(kind) else ""
        group, last = key.partition(".")[0], key.rpartition(".")[2]
        known = [name for name in self.keys() if typed or group not in self.roots or name.startswith(f"{group}.")]
        near = [name for name in known if name.rpartition(".")[2] == last or name.startswith(f"{key}_")]
        near = near[-3:] or difflib.get_close_matches(key, known, 1, 0.7)
        if near:
            return f"{of}; did you mean " + " or ".join(f"--{name}" if typed else name for name in near) + "?"
        if len(names) > MOST_NAMES:
            return f"{of}; moa fit --help all lists them"
        return f"{of}; {path or 'the first level'} takes {', '.join(names)}"

    def _keys(self, kind: Any, node: Any, path: str) -> Iterator[str]:
        try:
            names = self._names(kind, path)
        except UserError:  # no class is named yet
            names = None
        for name, child in (names or {}).items():
            key = f"{path}.{name}" if path else name
            yield key
            yield from self._keys(without_none(child), node, key)


def _class_of(config: dict[str, Any], path: str) -> str | None:
    """The class that a config names at a dotted option; it may stand there alone, without arguments."""
    try:
        given = lookup(config, path)
    except KeyError:
        return None
    return given.get("class_path") if isinstance(given, dict) else given


def _has_arguments(config: dict[str, Any], path: str) -> bool:
    try:
        return isinstance(lookup(config, path), dict)
    except KeyError:
        return False


def find_class(base: type, name: Any, where: str, modules: list[str]) -> type:
    """The subclass of `base` with a short name or a dotted import path; UserError names the known ones.

    Args:
        modules: the user's own, which a path may name besides the project's packages.
    """
    if not isinstance(name, str):
        raise UserError(f"{where} is {str(name)[:60]!r}; give the name of a class")
    known = {cls.__name__: cls for cls in _subclasses(base)}
    if name in known:
        return known[name]
    module, _, attribute = name.rpartition(".")
    if module and all(part.isidentifier() for part in name.split(".")):
        check_import(name, where, modules)
        try:
            found = getattr(importlib.import_module(module), attribute, None)
        except ModuleNotFoundError:
            found = None
        if isinstance(found, type) and issubclass(found, base):
            return found
    names = class_names(base, modules)
    near = difflib.get_close_matches(name.rpartition(".")[2], names, 1, 0.6)
    raise UserError(
        f"{where} '{name}' is unknown; " + (f"did you mean {near[0]}?" if near else f"choose from {', '.join(names)}")
    )


def import_path(cls: type) -> str:
    """The dotted name of a class: in its package, where that exports it, else in its module."""
    package = _package(cls.__module__)
    exported = getattr(sys.modules[package], cls.__name__, None) is cls
    return f"{package if exported else cls.__module__}.{cls.__qualname__}"


def class_names(base: type, modules: list[str]) -> list[str]:
    """Short names of the classes that a user may choose: those that base's package exports, and the user's own.

    Args:
        modules: the user's own.
    """
    package = sys.modules[_package(base.__module__)]
    exported = getattr(package, "__all__", ())
    users = {_package(module) for module in modules}
    own = [cls for cls in _subclasses(base) if _package(cls.__module__) in users]
    listed = [name for name in exported if _is_proper_subclass(getattr(package, name), base)]
    return sorted({*listed, *(cls.__name__ for cls in own)})


def _package(module: str) -> str:
    return module.partition(".")[0]


def _is_proper_subclass(value: Any, base: type) -> bool:
    return isinstance(value, type) and issubclass(value, base) and value is not base


def _subclasses(base: type) -> Iterator[type]:
    cls: type
    for cls in base.__subclasses__():
        yield cls
        yield from _subclasses(cls)


def is_base(kind: Any) -> bool:
    """Whether the user chooses a class there."""
    return isinstance(kind, type) and not is_dataclass(kind) and kind.__module__ not in ("builtins", "typing")


def parameters_of(cls: Any) -> dict[str, Any] | None:
    """Names and types that a constructor takes; None where it takes any.

    What a class of ours takes as `**options` it hands on to its base, but for what it gives the base itself.
    """
    if is_dataclass(cls):
        hints = get_type_hints(cls)
        return {field.name: hints[field.name] for field in fields(cls)}
    if cls.__init__ is object.__init__:
        return {}
    found: dict[str, Any] = {}
    given: set[str] = set()
    for owner in (base for base in cls.__mro__ if "__init__" in vars(base)):
        parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]
        rest = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters)
        hints = get_type_hints(owner.__init__)
        names = [parameter.name for parameter in parameters if parameter.kind is not inspect.Parameter.VAR_KEYWORD]
        found = {name: hints.get(name, Any) for name in names if name not in given} | found
        if not rest:
            return found
        if _package(owner.__module__) not in OWN:
            break
        given |= _given_to_base(owner.__init__)
    return None


@cache
def _given_to_base(constructor: Any) -> set[str]:
    """Names of the arguments with which a constructor calls that of its base, beside `**options`."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(constructor)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == BASE]
    return {keyword.arg for call in calls for keyword in call.keywords if keyword.arg is not None}


def without_none(kind: Any) -> Any:
    """X of `X | None`; other types as they are."""
    if get_origin(kind) not in (Union, UnionType):
        return kind
    rest = [part for part in get_args(kind) if part is not NoneType]
    return rest[0] if len(rest) == 1 else kind


def _refuses_none(kind: Any) -> bool:
    """Whether null is no value of a type: of a class or union without None, not of what is untyped."""
    return kind is not None and kind is not Any and NoneType not in get_args(kind)
