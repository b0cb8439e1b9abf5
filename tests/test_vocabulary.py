"""One word for one thing: names of modules, classes, functions and variables."""

import ast
import builtins
import re
from collections import defaultdict

from tests.test_layers import LAYERS, modules, nodes

TWICE = {  # public names that are defined twice, with the reason
    "main": "the entry of each command that is no configuration",
    "run": "each command as configured: a configuration in, what was made out",
}
ONE_NAME = {  # files of one name in neighbouring rooms, with the reason
    "export": "the command is called as users type it, and its work lies in lora/",
    "settings": "sources/settings says what a source may be told; the other reads the settings of any class",
    "masks": "the command is called as users type it; core/masks turns a mask into weights",
    "files": "lora/files holds LoRA files; files at the top is what writes any file",
}
FORBIDDEN = {  # words in identifiers, and what is said instead
    "picture": "image", "pictures": "images",
    "paint": "generate", "paints": "generates", "painted": "generated", "painting": "generating",
    "shot": "generation", "shots": "generations",
    "stamp": "fingerprint", "stamps": "fingerprints",
    "likeness": "near duplicate", "alike": "near duplicates",
    "upright": "orientation",
    "place": "path", "places": "paths",
    "utils": "a name of what is in it", "helpers": "a name of what is in it",
}  # fmt: skip
SETTINGS = {  # (module, word) of settings that users type
    ("training/callbacks", "pictures"),  # callbacks.report.pictures
    ("training/start_report", "pictures"),
}
ONLY_IN = {  # words that mean one thing, and the rooms or modules where that thing is
    "manifest": {"sources"},  # the user's list of media; a cache has an identity
    "share": {"reporting", "training", "cache", "batching", "core", "models", "lora"},  # a fraction, never a machine's
}


def definitions():
    """Public classes and functions at the top of modules: name to modules."""
    found = defaultdict(list)
    for module, path in modules().items():
        for node in nodes(path)[0].body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and node.name[0] != "_":
                found[node.name].append(module)
    return found


def identifiers(path):
    """Names that a file gives, with their lines: of functions, classes, parameters, variables and attributes."""
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, node.lineno


def words(name):
    """The words of an identifier, in lower case."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z0-9]+|[A-Z]+(?![a-z])", name)}


def neighbours(one, other):
    """Whether two modules lie in one room and the next: in a room and what is in it, or in rooms side by side."""
    if len(one) > len(other):
        one, other = other, one
    if one == other[: len(one)]:
        return True
    order = [room for of in LAYERS for room in (sorted(of) if isinstance(of, set) else [of])]
    return len(one) == len(other) == 1 and abs(order.index(one[0]) - order.index(other[0])) == 1


def test_no_public_name_is_defined_twice():
    twice = {name: places for name, places in definitions().items() if len(places) > 1 and name not in TWICE}
    assert not twice, "\n".join(f"{name}: {', '.join(places)}" for name, places in sorted(twice.items()))


def test_no_public_name_is_that_of_a_builtin_or_of_torch():
    assert not definitions().keys() & {*dir(builtins), "Dataset", "Module", "Tensor"}


def test_a_file_is_called_after_what_is_in_it():
    wrong = [name for name in modules() if re.search(r"(^|_|/)(parts|utils|helpers|misc|common)$", name)]
    assert not wrong, ", ".join(wrong)


def test_no_two_files_of_neighbouring_rooms_have_one_name():
    rooms = defaultdict(list)
    for module in modules():
        *room, name = module.split("/")
        if name != "__init__" and name not in ONE_NAME:
            rooms[name].append(tuple(room))
    wrong = [
        f"{name}: {'/'.join(one) or 'top'} and {'/'.join(other) or 'top'}"
        for name, found in rooms.items()
        for number, one in enumerate(found)
        for other in found[number + 1 :]
        if neighbours(one, other)
    ]
    assert not wrong, "\n".join(wrong)


def test_exceptions_are_needed():
    files = [name.split("/")[-1] for name in modules()]
    assert all(len(definitions()[name]) > 1 for name in TWICE)
    assert all(files.count(name) > 1 for name in ONE_NAME), "an exception that nothing needs: delete it"


def test_identifiers_keep_to_the_vocabulary():
    wrong = []
    for module, path in modules().items():
        for name, line in identifiers(path):
            old = {word for word in words(name) & FORBIDDEN.keys() if (module, word) not in SETTINGS}
            wrong += [f"{module}:{line}: {name}: say {FORBIDDEN[word]}" for word in old]
    assert not wrong, "\n".join(dict.fromkeys(wrong))


def test_words_of_one_meaning_stay_where_it_is():
    wrong = []
    for module, path in modules().items():
        for name, line in identifiers(path):
            for word, rooms in ONLY_IN.items():
                if word in words(name) and not {module, module.split("/")[0]} & rooms:
                    wrong.append(f"{module}:{line}: {name}: {word} is for {', '.join(sorted(rooms))}")
    assert not wrong, "\n".join(dict.fromkeys(wrong))
