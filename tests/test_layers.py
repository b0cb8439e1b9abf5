"""Imports point one way."""

import ast
import re
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "mpp"
MODELS = sorted((Path(__file__).parents[1] / "configs" / "model").glob("*.yaml"))
LAYERS = [  # each may import from those before it
    {"files"},
    {"core"},
    {"models"},
    {"data"},
    {"masking"},
    {"coverage", "painting"},
    {"training", "reporting"},
    {"cli", "settings", "config"},
    {"prepare", "train", "sample", "export", "report", "masks"},
]
SHELL = {"module", "callbacks", "start_report", "checkpoint"}
LIGHTNING = {"data/datamodule", *(f"training/{name}" for name in SHELL), "train"}
HYDRA = {"config", "train", "prepare", "sample", "export", "report", "masks"}


def modules():
    return sorted(path for path in SOURCE.rglob("*.py") if path.name != "__init__.py")


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(part):
    return next(number for number, names in enumerate(LAYERS) if part in names)


def may_import(name, imported):
    """Whether a module, by its path, may import another."""
    root, *parts = imported.split(".")
    if root == "mpp" and parts and parts[0] not in ("__version__",):
        return layer(parts[0]) <= layer(name.split("/")[0])
    if root in ("lightning", "pytorch_lightning"):
        return name in LIGHTNING
    return name in HYDRA or root not in ("hydra", "omegaconf")


def test_modules_import_only_from_lower_layers():
    names = {path: path.relative_to(SOURCE).with_suffix("").as_posix() for path in modules()}
    assert [f"{n} imports {i}" for path, n in names.items() for i in imports(path) if not may_import(n, i)] == []


def test_core_is_pure():
    allowed = {"torch", "jaxtyping", "mpp", "math", "dataclasses", "typing", "collections", "hashlib"}
    for path in (SOURCE / "core").glob("*.py"):
        roots = {name.split(".")[0] for name in imports(path)}
        assert roots <= allowed, f"{path.name}: {roots - allowed}"


def architectures():
    """Modules that a model config names as its class."""
    targets = [re.search(r"^_target_: mpp\.models\.(\w+)\.", path.read_text(), re.MULTILINE) for path in MODELS]
    return {match[1] for match in targets if match}


def test_no_architecture_imports_another():
    found = architectures()
    assert {"wan", "toy", "flux2"} <= found
    for path in (SOURCE / "models").glob("*.py"):
        others = {n.split(".")[2] for n in imports(path) if n.startswith("mpp.models.")} & found
        assert others <= {path.stem}, f"{path.name} imports {others}"


def test_nothing_outside_models_names_a_family():
    roots = {re.sub(r"(_image|_video).*|\d+$", "", name) for name in architectures()}
    assert {"wan", "flux", "qwen", "hunyuan"} <= roots
    names = re.compile(rf"(?<![a-z])({'|'.join(sorted(roots))})(?![a-z])", re.IGNORECASE)
    for path in modules():
        # the sigma laws say whose they are, another program's formats whose samples they hold
        if path.parent.name != "models" and path.name not in ("flow.py", "musubi_formats.py"):
            assert not names.search(path.read_text()), f"{path.name}: {names.search(path.read_text())}"
