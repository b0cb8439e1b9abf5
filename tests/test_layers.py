"""Imports point one way: from the commands down to the core, from room to room and from module to module."""

import ast
import re
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "mpp"
MODELS = sorted((Path(__file__).parents[1] / "configs" / "model").glob("*.yaml"))
COMMANDS = {"prepare", "train", "sample", "export", "report", "plan", "masks", "init", "run"}
LAYERS = [  # rooms, or modules of the top; each may import from those before it
    "wording",
    "files",
    "workers",
    "core",
    "memory",
    "models",
    "media",
    "lora",
    "sources",
    "cache",
    "musubi",
    "masking",
    "sampling",
    "preparing",
    "batching",
    "training",
    "reporting",
    "outline",
    "settings",
    "job_file",
    "cli",
    "messages",
    "logs",
    "jobs",
    "checks",
    "config",
    "recorded",
    "fitting",
    COMMANDS,
]
KNOW = {  # who may import a framework: rooms, or single modules
    "lightning": {"batching/datamodule", "training", "fitting", "train"},
    "hydra": {"config", "recorded", "fitting", "cli", "messages", "jobs", "checks", *COMMANDS},
    "omegaconf": {"config", "recorded", "fitting", "cli", "messages", "jobs", "checks", *COMMANDS},
}
KNOW["pytorch_lightning"] = KNOW["lightning"]
FREE = {"training/step", "training/teacher"}  # of `training`, what is plain torch
PURE = {"torch", "jaxtyping", "mpp", "math", "dataclasses", "typing", "collections", "hashlib"}
SPEAK_OF_FAMILIES = {"models", "musubi"}  # musubi's file formats differ from family to family
NAMES_FAMILIES = {  # single modules that may, with the reason
    "core/flow",  # the sigma laws say whose they are
    "lora/formats",  # what a fused layer is called, by the example of one
}


def modules():
    """Every module by its name below `mpp`, with slashes."""
    return {p.relative_to(SOURCE).with_suffix("").as_posix(): p for p in sorted(SOURCE.rglob("*.py"))}


@cache
def nodes(path):
    """A file's syntax tree as a list."""
    return list(ast.walk(ast.parse(path.read_text())))


@cache
def imports(path):
    """What a file imports, by its full name, functions and type checking included."""
    found = []
    for node in nodes(path):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return found


@cache
def arrows():
    """For each module the modules of `mpp` that it imports."""
    known = modules()
    found = {}
    for name, path in known.items():
        named = {
            imported.removeprefix("mpp.").replace(".", "/") for imported in imports(path) if imported[:4] == "mpp."
        }
        found[name] = {other for other in named if other in known and other != name}
    return found


def layer(name):
    """The number of a module's layer; None where no layer has it."""
    room = name.split("/")[0]
    return next(
        (number for number, of in enumerate(LAYERS) if room == of or (isinstance(of, set) and room in of)), None
    )


def circles(graph):
    """The groups of modules that import each other round about, each sorted."""
    reach = {name: set(others) for name, others in graph.items()}
    while True:
        more = {name: set().union(others, *(reach[other] for other in others)) for name, others in reach.items()}
        if more == reach:
            break
        reach = more
    groups = {
        tuple(sorted(other for other in reach[name] if name in reach[other])) for name in reach if name in reach[name]
    }
    return sorted(groups)


def families():
    """Modules that a model config names as its class."""
    targets = [re.search(r"^_target_: mpp\.models\.families\.(\w+)\.", p.read_text(), re.MULTILINE) for p in MODELS]
    return {match[1] for match in targets if match}


def test_every_module_belongs_to_a_layer():
    homeless = [name for name in modules() if layer(name) is None and not name.endswith("__init__")]
    assert not homeless, f"no layer has {', '.join(homeless)}"


def test_imports_run_down_only():
    wrong = [
        f"{name} imports {other}"
        for name, others in arrows().items()
        for other in sorted(others)
        if None not in (layer(name), layer(other)) and layer(other) > layer(name)
    ]
    assert not wrong, "imports that run up:\n" + "\n".join(wrong)


def test_no_modules_import_each_other_round_about():
    found = circles(arrows())
    assert not found, "circles:\n" + "\n".join(" <-> ".join(group) for group in found)


def test_rooms_do_not_import_each_other_round_about():
    rooms = {}
    for name, others in arrows().items():
        room = name.split("/")[0]
        rooms.setdefault(room, set()).update(other.split("/")[0] for other in others if other.split("/")[0] != room)
    found = circles({room: others & rooms.keys() for room, others in rooms.items()})
    assert not found, "circles:\n" + "\n".join(" <-> ".join(group) for group in found)


def test_only_those_who_must_know_a_framework_import_it():
    wrong = []
    for name, path in modules().items():
        for imported in imports(path):
            allowed = KNOW.get(imported.split(".")[0])
            if allowed is not None and (name in FREE or not allowed & {name, name.split("/")[0]}):
                wrong.append(f"{name} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_core_is_pure():
    roots = {name: {i.split(".")[0] for i in imports(p)} - PURE for name, p in modules().items() if name[:5] == "core/"}
    wrong = [f"{name} imports {', '.join(sorted(more))}" for name, more in roots.items() if more]
    assert not wrong, "\n".join(wrong)


def test_a_family_is_one_file_and_imports_no_other():
    files = {name.split("/")[-1] for name in modules() if name.startswith("models/families/")} - {"__init__"}
    assert {"wan", "toy", "flux2"} <= files
    assert files == families(), "in models/families lies what no model config names"
    wrong = [
        f"{name} imports {other}"
        for name, others in arrows().items()
        for other in sorted(others)
        if other.startswith("models/families/") and not other.endswith("__init__")
    ]
    assert not wrong, "\n".join(wrong)


def test_nothing_outside_models_names_a_family():
    roots = {re.sub(r"(?<=..)(_image|_video).*|\d+$", "", name) for name in families()}
    assert {"wan", "flux", "qwen", "hunyuan"} <= roots
    names = re.compile(rf"(?<![a-z])({'|'.join(sorted(roots))})(?![a-z])", re.IGNORECASE)
    wrong = [
        f"{name}: {match[0]}"
        for name, path in modules().items()
        if name.split("/")[0] not in SPEAK_OF_FAMILIES and name not in NAMES_FAMILIES
        for match in [names.search(path.read_text())]
        if match
    ]
    assert not wrong, "\n".join(wrong)
