"""What holds on every operating system: read from the source, and by stand-ins for what other systems do."""

import ast
import random
from pathlib import PurePosixPath, PureWindowsPath

import pytest
from PIL import Image

from mpp.media.paths import as_path, list_files
from mpp.sources.manifest import _below
from mpp.sources.source import _bad_key
from tests.helpers import draw_photos, prepare
from tests.test_cli import drawn_name
from tests.test_command_line import run as run_command
from tests.test_jobs import RUN
from tests.test_layers import modules, nodes

ELSEWHERE = {  # what only some systems have: modules, and attributes of `os`, `signal` and `socket`
    *("fcntl", "grp", "pwd", "resource", "termios", "msvcrt", "winreg"),
    *("fork", "forkpty", "getuid", "geteuid", "getgid", "umask", "killpg", "setsid", "mkfifo", "chown", "statvfs"),
    *("SIGKILL", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGCHLD", "SIGALRM", "alarm", "setitimer", "pause"),
    *("pthread_sigmask", "sigtimedwait", "sigwaitinfo", "sigwait"),
}
GUARDED = {  # behind `hasattr`, or where their import fails on Windows
    "workers": {"pthread_sigmask", "sigtimedwait"},
    "training/pace": {"resource"},
}


def _calls(path):
    return [node for node in nodes(path) if isinstance(node, ast.Call)]


def test_text_is_read_and_written_in_an_encoding_that_is_named():
    wrong = []
    for module, path in modules().items():
        for call in _calls(path):
            name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
            given = {keyword.arg for keyword in call.keywords}
            words = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
            builtin = name == "open" and isinstance(call.func, ast.Name)
            method = name == "open" and isinstance(call.func, ast.Attribute) and not call.args
            bytes_or_named = "encoding" in given or any(isinstance(w, str) and ("b" in w or "utf" in w) for w in words)
            text = name == "write_text" or (name == "read_text" and isinstance(call.func, ast.Attribute))
            if (text or builtin or method) and not bytes_or_named:
                wrong.append(f"{module}:{call.lineno}: {name}")
    assert not wrong, "\n".join(wrong)


def test_nothing_is_used_that_only_some_systems_have():
    wrong = []
    for module, path in modules().items():
        for node in nodes(path):
            used = set()
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used = {node.attr} if node.value.id in ("os", "signal", "socket") else set()
            elif isinstance(node, ast.Import):
                used = {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                used = {node.module, *(alias.name for alias in node.names)}
            found = used & ELSEWHERE - GUARDED.get(module, set())
            wrong += [f"{module}:{node.lineno}: {name}" for name in found]
    assert not wrong, "\n".join(wrong)


# ---------------------------------------------------------------- names


def _part(draws):
    return "".join(draws.choice("abcXYZ 012_-.é") for _ in range(draws.randint(1, 6))).strip(" .") or "x"


def test_keys_of_a_manifest_are_paths_with_slashes_whatever_a_path_looks_like():
    draws = random.Random(10)
    for _ in range(200):
        folder, below = ([_part(draws) for _ in range(draws.randint(1, 3))] for _ in range(2))
        drive, other = draws.sample("CDEF", 2)
        inside = draws.random() < 0.5
        posix = PurePosixPath("/", *(folder if inside else ["elsewhere"]), *below)
        windows = PureWindowsPath(f"{drive if inside else other}:\\", *(folder if inside else ["elsewhere"]), *below)
        expected = "/".join(below if inside else ["elsewhere", *below])
        assert _below(posix, PurePosixPath("/", *folder)) == expected
        # capitals of a folder are written as anyone likes
        assert _below(windows, PureWindowsPath(f"{drive.lower()}:/", *map(str.upper, folder))) == expected


def test_a_key_that_names_no_file_on_windows_is_refused_there(monkeypatch):
    draws = random.Random(11)
    reserved = [
        "con",
        "NUL",
        "aux.1",
        "COM1",
        "lpt9.x",
        "a:b",
        "what?",
        'say "x"',
        "a|b",
        "a<b",
        "a\\b",
        "end.",
        "end ",
    ]
    plain = ["console", "nuls", "auxiliary", "com", "a-b", "what", "@val", "p@flip", "v@00012-081", "ü", ".a"]
    keys = [["/".join([*draws.sample(plain, draws.randint(0, 2)), bad]), True] for bad in reserved for _ in range(3)]
    keys += [["/".join(draws.sample(plain, draws.randint(1, 3))), False] for _ in range(30)]
    for key, _ in keys:
        assert _bad_key(key) is None
    monkeypatch.setattr("mpp.sources.source.WINDOWS", True)
    for key, bad in keys:
        assert (_bad_key(key) is not None) == bad, key


def test_a_url_of_a_file_may_have_a_drive():
    assert str(as_path("file:///C:/photos/a b")) == "C:/photos/a b"
    assert str(as_path("file:///photos/C:/x")) == "/photos/C:/x"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_folders_of_any_name_are_used_by_the_commands(pipeline, tmp_path, seed):
    draws, names = random.Random(seed), []
    while len(names) < 4:
        name = drawn_name(draws)
        if name[0] not in "'\"~." and "${" not in name and name.strip() == name:
            names.append(name + str(len(names)))
    photos, masks, cache, out = names
    draw_photos(tmp_path / photos, tmp_path / masks, count=2)
    model = ["model=tiny_wan", f"model.pretrained={pipeline}", f"data.cache_dir={cache}"]
    places = [f"data.image_dir={photos}", f"data.mask_dir={masks}", "data.resolution=64", "device=cpu"]
    for command, words in {
        "prepare": [*model, *places],
        "train": [*model, f"output_dir={out}", *RUN],
        "report": [f"data.cache_dir={cache}"],
    }.items():
        ended = run_command(f"mpp.{command}", *words, cwd=tmp_path)
        assert ended.returncode == 0, (names, ended.stderr[-2000:])
    assert {path.name for path in tmp_path.iterdir()} == {*names, f"{cache}_report.html"}
    assert (tmp_path / out / "lora.safetensors").exists()


# ---------------------------------------------------------------- disks that tell no capitals apart, by a stand-in


def test_two_images_of_one_file_name_for_the_disk_are_refused_before_anything_is_encoded(
    pipeline, tmp_path, monkeypatch
):
    monkeypatch.setattr("mpp.preparing.preparation.names_told_apart", lambda folder: str.casefold)
    draws = random.Random(12)
    for number in range(6):
        root, name = tmp_path / str(number), draws.choice(["image", "Photo 1", "ÜBER"])
        draw_photos(root / "photos", root / "masks", count=draws.randint(1, 3))
        for spelling, suffix in ((name.upper(), "png"), (name.lower(), "webp")):
            Image.new("RGB", (64, 64)).save(root / "photos" / f"{spelling}.{suffix}")
        if name.upper() == name.lower():
            continue
        with pytest.raises(ValueError, match="one file name for the disk of data.cache_dir; rename one") as caught:
            prepare(pipeline, root)
        assert f"{name.upper()}.png" in str(caught.value)
        assert f"{name.lower()}.webp" in str(caught.value)
        assert not (root / "cache" / "latents").exists()


def test_a_folder_of_masks_is_left_out_however_its_capitals_are_typed(tmp_path, monkeypatch):
    (tmp_path / "photos" / "Masks").mkdir(parents=True)
    (tmp_path / "photos" / "a.png").touch()
    (tmp_path / "photos" / "Masks" / "a.png").touch()
    typed = str(tmp_path / "photos" / "masks")
    assert len(list_files(tmp_path / "photos", [typed])) == 2  # two folders on this disk
    (tmp_path / "photos" / "masks").symlink_to("Masks")  # so that both are one
    assert [listed.name for listed in list_files(tmp_path / "photos", [typed])] == ["a.png"]
