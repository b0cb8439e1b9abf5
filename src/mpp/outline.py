"""Classes by their source alone, so that settings are known without importing torch, diffusers and what else they use.

Python itself makes them of those lines of a file that say what can be set: fields, the constructor's signature, the
docstring, the classes they inherit from, and values that stand for defaults. Nothing else of that file, or of those it
imports, is run. What cannot be known so is refused: then the class is to be imported. An outline is never a guess.
"""

import __future__

import ast
import functools
import importlib
import importlib.util
import inspect
import sys
import typing
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

READ = frozenset({"mpp", "torch", "lightning", "diffusers", "prodigyopt", "schedulefree"})  # packages that are read so
OWN = frozenset({"mpp"})  # of which the classes in hints and defaults are made as well; of others a name is enough
_SIGNATURES = ("__init__", "__new__")
_HARMLESS = ("__doc__", "__module__")
_DATACLASS = ("dataclass", "dataclasses.dataclass")


class UnreadableError(Exception):
    """A source does not say enough: the class must be imported."""


class _Unread(type):
    """The class of what is not looked into: good for a type hint, of no use as a value or a base."""

    def __getitem__(cls, _: object) -> "_Unread":
        return cls

    def __getattr__(cls, name: str) -> "_Unread":
        if name[:2] == "__":
            raise AttributeError(name)
        return _Unread(name, (), {"__module__": f"{cls.__module__}.{cls.__name__}"})

    def __call__(cls, *_: object, **__: object) -> typing.NoReturn:
        raise UnreadableError(cls.__name__)


class _Module:
    """A module that is not imported, whose names are looked up in its source."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return _from(self._name, name)


def outline(target: str) -> Any:  # noqa: ANN401
    """The class or function of that full name by its source: equal in signature, fields, type hints and docstring.

    Raises:
        UnreadableError: It cannot be known without importing it.
    """
    module, _, name = target.rpartition(".")
    try:
        found = _made(*_definition(module, name))
        values = [p.default for p in inspect.signature(found).parameters.values()]
        if is_dataclass(found):
            values += [f.default_factory() for f in fields(found) if f.default_factory is not MISSING]
    except Exception as error:  # whatever it is, importing says more
        raise UnreadableError(f"{target}: {error}") from error
    if any(map(_is_unread, values)):
        raise UnreadableError(f"{target}: the value of a default lies outside")
    return found


def _is_unread(value: Any) -> bool:  # noqa: ANN401
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return isinstance(value, _Unread | _Module) or any(map(_is_unread, inner))


# ---------------------------------------------------------------- where a name is defined


class _Source:
    """A module's file: which statements define its names, and what of them was made so far."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.is_package = name, path.stem == "__init__"
        body = ast.parse(path.read_bytes()).body
        future = [node for node in body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
        self.flags = __future__.annotations.compiler_flag if future else 0
        self.names: dict[str, list[ast.stmt]] = {}
        for bound, node in _bindings(body):
            self.names.setdefault(bound, []).append(node)
        self.values: dict[str, Any] = {"__name__": name}
        self.made: dict[str, Any] = {}
        self.making: set[str] = set()

    def defines(self, name: str) -> ast.stmt:
        """The statement that gives a name its meaning.

        Raises:
            UnreadableError: None does, or it depends on what happens there.
        """
        nodes = self.names.get(name, [])
        if all(isinstance(node, ast.Import) for node in nodes):
            nodes = nodes[:1]  # `import torch` and `import torch.optim`
        if len(nodes) != 1 or isinstance(nodes[0], ast.If | ast.Try):
            raise UnreadableError(f"{self.name}.{name} is not defined, or not in one way")
        return nodes[0]

    def imported(self, name: str) -> tuple[str, str] | None:
        """The module that a name is imported from, and the name there, "" for the module itself; None: it is not."""
        node = self.defines(name)
        if isinstance(node, ast.Import):
            alias = next(a for a in node.names if name == (a.asname or a.name.partition(".")[0]))
            return (alias.name if alias.asname else name), ""
        if not isinstance(node, ast.ImportFrom):
            return None
        above = self.name.split(".")[: len(self.name.split(".")) + self.is_package - node.level] if node.level else []
        module = ".".join([*above, *([node.module] if node.module else [])])
        return module, next(a.name for a in node.names if name == (a.asname or a.name))


def _bindings(body: list[ast.stmt]) -> Iterator[tuple[str, ast.stmt]]:
    """Names at the top of a file, and the statements that give them their meaning."""
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.asname or alias.name for alias in node.names]
            yield from ((name.partition(".")[0], node) for name in names)
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from _bindings(node.orelse)
        elif isinstance(node, ast.Try) and all(ast.unparse(at.type or at) == "ImportError" for at in node.handlers):
            yield from _bindings(node.body)
        elif isinstance(node, ast.If | ast.Try):
            handlers = [at for handler in getattr(node, "handlers", []) for at in handler.body]
            yield from ((name, node) for name, _ in _bindings([*node.body, *node.orelse, *handlers]))
        else:
            yield from ((name, node) for at in ast.walk(node) for name in _changed(at))


def _changed(at: ast.AST) -> set[str]:
    """The names that a part of a statement gives a value, or may change the value of; a docstring is no such change."""
    if isinstance(at, ast.Expr) and isinstance(at.value, ast.Call):
        called = at.value  # `names.append(...)`, `setattr(kind, ...)`
        at = called.args[0] if ast.unparse(called.func) in ("setattr", "delattr") else getattr(called.func, "value", at)
    elif not isinstance(getattr(at, "ctx", None), ast.Store | ast.Del) or getattr(at, "attr", "") in _HARMLESS:
        return set()
    while isinstance(at, ast.Attribute | ast.Subscript):
        at = at.value
    return {at.id} if isinstance(at, ast.Name) else set()


@functools.cache
def _folders(package: str) -> list[str]:
    spec = importlib.util.find_spec(package) if package in READ else None  # of inner modules it would import the outer
    return list(spec.submodule_search_locations or ()) if spec else []


@functools.cache
def _file(module: str) -> Path | None:
    """A module's file; None where there is none to read."""
    package, *inner = module.split(".")
    paths = [Path(folder, *inner) for folder in _folders(package)]
    files = [file for path in paths for file in (path / "__init__.py", path.with_suffix(".py"))]
    return next((file for file in files if file.is_file()), None)


@functools.cache
def _source(module: str) -> _Source:
    """A module's source.

    Raises:
        UnreadableError: There is none to read.
    """
    file = _file(module)
    if file is None:
        raise UnreadableError(f"{module} has no source to read")
    return _Source(module, file)


def _definition(module: str, name: str) -> tuple[_Source, str]:
    """The file that defines a name, and how it is called there, past all files that import it from there.

    Raises:
        UnreadableError: They are not in what is read.
    """
    source = _source(module)
    imported = source.imported(name)
    return (source, name) if imported is None else _definition(*imported)


# ---------------------------------------------------------------- what it means


def _from(module: str, name: str) -> Any:  # noqa: ANN401
    """What a name of another module stands for: itself where that is imported or Python's own, else by its source."""
    if module in sys.modules or module.partition(".")[0] in sys.stdlib_module_names:
        found = importlib.import_module(module)
        return getattr(found, name) if name else found
    if not name or _file(f"{module}.{name}") is not None:
        return _Module(f"{module}.{name}".rstrip("."))
    try:
        if module == "torch":  # whose own file is long, and classes are all that hints name there
            raise UnreadableError(name)
        return _value(*_definition(module, name))
    except UnreadableError:
        return _Unread(name, (), {"__module__": module})


def _value(source: _Source, name: str) -> Any:  # noqa: ANN401
    """What a name means in a module."""
    if name not in source.values:
        node, imported = source.defines(name), source.imported(name)
        if imported is not None:
            source.values[name] = _from(*imported)
        elif isinstance(node, ast.ClassDef) and source.name.partition(".")[0] not in OWN:
            return _Unread(name, (), {"__module__": source.name})
        elif isinstance(node, ast.ClassDef | ast.FunctionDef):
            source.values[name] = _made(source, name)
        elif name in source.making:
            raise UnreadableError(f"{source.name}.{name} needs itself")
        else:
            source.making.add(name)
            try:
                _run(source, node)
            finally:
                source.making.discard(name)
    return source.values[name]


def _made(source: _Source, name: str) -> Any:  # noqa: ANN401
    """A class or function, made of the lines that say what can be set."""
    node = source.defines(name)
    if not isinstance(node, ast.ClassDef | ast.FunctionDef) or name in source.making:
        raise UnreadableError(f"{source.name}.{name} is neither class nor function, or needs itself")
    if name not in source.made:
        source.making.add(name)
        try:
            _run(source, _of_class(source, node) if isinstance(node, ast.ClassDef) else _signature(source, node))
        finally:
            source.making.discard(name)
        if isinstance(source.values[name], _Unread):
            raise UnreadableError(f"{source.name}.{name} inherits from what is not read")
        source.made[name] = source.values[name]
    return source.made[name]


def _run(source: _Source, node: ast.stmt) -> None:
    """Let Python run a statement of a file, once the names in it have their meaning."""
    for name in _read([node]) & source.names.keys() - source.making:
        try:
            _value(source, name)
        except UnreadableError:  # perhaps it is not needed; else Python says so
            continue
    module = ast.fix_missing_locations(ast.Module([node], []))
    exec(compile(module, source.name, "exec", source.flags, dont_inherit=True), source.values)  # noqa: S102


def _read(nodes: Sequence[ast.stmt]) -> set[str]:
    """The names whose values statements read."""
    parts = [at for node in nodes for at in ast.walk(node)]
    return {at.id for at in parts if isinstance(at, ast.Name) and isinstance(at.ctx, ast.Load)}


def _of_class(source: _Source, node: ast.ClassDef) -> ast.ClassDef:
    named = [ast.unparse(at.func if isinstance(at, ast.Call) else at) for at in node.decorator_list]
    if not set(named) <= {*_DATACLASS, "runtime_checkable"}:
        raise UnreadableError(f"{source.name}.{node.name} is decorated")
    is_record = bool(set(named) & set(_DATACLASS))
    body: list[ast.stmt] = [ast.Expr(ast.Constant(text))] if (text := ast.get_docstring(node, clean=False)) else []
    left_out: list[ast.stmt] = []
    for at in node.body:
        if isinstance(at, ast.AnnAssign) and is_record and "ClassVar" not in ast.unparse(at.annotation):
            body.append(at)
        elif isinstance(at, ast.FunctionDef) and at.name in _SIGNATURES:
            body.append(_signature(source, at))
        elif isinstance(at, ast.FunctionDef) and at.name == "__post_init__":
            body.append(at)
        elif isinstance(at, ast.If | ast.Try):
            raise UnreadableError(f"{source.name}.{node.name} depends on what happens there")
        else:
            left_out.append(at)
    lacking = {name for name, _ in _bindings(left_out)}
    if lacking & {*_SIGNATURES, "__post_init__", "__signature__", *_read(body)}:
        raise UnreadableError(f"{source.name}.{node.name} sets what its constructor is, or its defaults, within itself")
    bases = [_base(source, base, f"{node.name} {number}") for number, base in enumerate(node.bases)]
    return ast.ClassDef(node.name, bases, node.keywords, body or [ast.Pass()], node.decorator_list)


def _base(source: _Source, base: ast.expr, key: str) -> ast.expr:
    """A class that another one inherits from; its outline, of another package too, lies ready under a name."""
    first, *inner = ast.unparse(base).split(".")
    imported = source.imported(first) if first in source.names else None
    *path, name = [part for part in (*(imported or (source.name, first)), *inner) if part]
    module = ".".join(path)
    if isinstance(base, ast.Subscript) or module in sys.modules or module.partition(".")[0] not in READ:
        return base
    source.values[key] = _made(*_definition(module, name))
    return ast.Name(key, ast.Load())


def _signature(source: _Source, node: ast.FunctionDef) -> ast.FunctionDef:
    """A function without its body: calling it is an error. Decorators must keep the signature, by `functools.wraps`."""
    for decorator in node.decorator_list:
        where, name = _definition(source.name, ast.unparse(decorator))
        calls = [at for at in ast.walk(where.defines(name)) if isinstance(at, ast.Call)]
        if not any(ast.unparse(call.func) in ("wraps", "functools.wraps") for call in calls):
            raise UnreadableError(f"{source.name}.{node.name} is decorated")
    body: list[ast.stmt] = [ast.Expr(ast.Constant(text))] if (text := ast.get_docstring(node, clean=False)) else []
    body.append(ast.Raise(ast.Name("NotImplementedError", ast.Load())))
    return ast.FunctionDef(node.name, node.args, body, [], node.returns)
