"""Thousands of damaged cache files: each is an error that names the file, or reads as if nothing had happened."""

import json
import random
import shutil

import pytest
import torch

from mpp.musubi.cache import MusubiCache
from tests.musubi import stored as fixtures
from tests.musubi.test_cache import model

ROUNDS = 600


def masked(made, key, shape):
    return {**made.latents, key: fixtures.mask_values(shape)}


def video(folder):
    """Two clips of one video and a clip of another, with CLIP's features; one has a mask."""
    made, other = fixtures.wan(clip=24), fixtures.wan(clip=24, tokens=7, seed=50)
    mask = masked(made, "mask_weights_2x4x6_float16", (1, 2, 4, 6))
    fixtures.latents_file(folder, "wan", "a", mask, window=(0, 5), baked=(1.0, 0.0))
    fixtures.latents_file(folder, "wan", "a", other.latents, window=(5, 5))
    fixtures.text_file(folder, "wan", "a", made.text)
    other.write(folder, "wan", "b_c")
    return "WAN 2.1 I2V"


def padded(folder):
    """Texts of one length with masks."""
    for item, tokens in (("a", 5), ("b", 9)):
        made = fixtures.hv(tokens=tokens, seed=tokens)
        fixtures.text_file(folder, "hv", item, made.text)
        fixtures.latents_file(folder, "hv", item, masked(made, "mask_weights_2x4x6_float16", (1, 2, 4, 6)))
    return "HunyuanVideo T2V"


def images(folder):
    """Control images, and latents without an axis of frames."""
    for item, seed in (("a", 0), ("b", 50)):
        made = fixtures.flux2(tokens=112, controls=[(4, 4), (2, 6)], seed=seed)
        fixtures.text_file(folder, "f2k4b", item, made.text)
        latents = masked(made, "mask_weights_4x6_float16", (1, 1, 4, 6))
        fixtures.latents_file(folder, "f2k4b", item, latents, baked=(0.7, 0.05))
    return "FLUX.2 klein"


def first_frames(folder):
    """Two texts in a file, one of them empty, and images' states."""
    for item, glyphs in (("a", 0), ("b", 3)):
        fixtures.hv15(glyphs=glyphs, siglip=20, seed=glyphs).write(folder, "hv15", item)
    return "HunyuanVideo 1.5 I2V"


def everything(folder, arch):
    """All that is read of a folder, by sample and name; and what was left out."""
    cache = MusubiCache(folder, arch)
    cache.identity()
    found = {}
    for entry in cache.entries():
        record = cache.conditioning(entry, arch.conditioning).tensors()
        tensors = {"latents": cache.latents(entry), "mask": cache.mask(entry), **record}
        found[entry.key] = {name: tensor.clone() for name, tensor in tensors.items()}  # files are mapped, and change
    return found, cache.left_out


# ------------------------------------------------- mutations: to other bytes, and whether values may differ


def head(data):
    """Where the tensors begin."""
    return 8 + int.from_bytes(data[:8], "little")


def ordered(data):
    """The same file with its header in one order: safetensors writes metadata in any."""
    text = json.dumps(json.loads(data[8 : head(data)]), sort_keys=True).encode()
    return len(text).to_bytes(8, "little") + text + data[head(data) :]


def flip_header(data, chance):
    for _ in range(chance.randint(1, 3)):
        data[chance.randrange(head(data) if head(data) <= len(data) else len(data))] = chance.randrange(256)
    return data, False


def flip_anything(data, chance):
    start, paths = head(data), [chance.randrange(len(data)) for _ in range(chance.randint(1, 4))]
    for path in paths:
        data[path] ^= 1 << chance.randrange(8)
    return data, any(path >= start for path in paths)


def cut(data, chance):
    return data[: chance.randrange(len(data))], False


def grow(data, chance):
    return data + chance.randbytes(chance.randint(1, 64)), False


def overwrite(data, chance):
    start = chance.randrange(len(data))
    stop = min(len(data), start + chance.randint(1, 200))
    data[start:stop] = chance.randbytes(stop - start)
    return data, stop > head(data)


def length(data, chance):
    data[:8] = chance.choice([0, 1, 8, len(data), 2**31, 2**63, chance.randrange(2**64)]).to_bytes(8, "little")
    return data, False


def edit(data, chance):
    """A well-formed header that says something else."""
    start = head(data)
    header = json.loads(data[8:start])
    said = header.pop("__metadata__")
    key = chance.choice(list(header))
    spec = header[key]
    kind = chance.randrange(9)
    if kind == 0:  # another key
        letters = list(key)
        letters[chance.randrange(len(letters))] = chance.choice("_x0129abf")
        header["".join(letters)] = header.pop(key)
    elif kind == 1:
        spec["dtype"] = chance.choice(["F16", "BF16", "F32", "F64", "I32", "I64", "U8", "BOOL", "F8_E4M3", "C64", "?"])
    elif kind == 2:
        chance.shuffle(spec["shape"])
    elif kind == 3:  # as many numbers in another shape
        spec["shape"] = chance.choice([[1, *spec["shape"]], [*spec["shape"], 1], [-1], [0], [2**62, 2**62], [2**40]])
    elif kind == 4:
        spec["data_offsets"][chance.randrange(2)] = chance.randrange(-8, len(data) * 2)
    elif kind == 5:
        header[chance.choice(["extra", "latents", "latents_image", "mask_weights", "clip", "llm_mask", key + "_x"])] = {
            "dtype": "F32", "shape": [0], "data_offsets": [0, 0],
        }  # fmt: skip
    elif kind == 6:
        said.pop(chance.choice(list(said)))
    elif kind == 7:
        name = chance.choice(list(said))
        said[name] = chance.choice(["", "0", "-1", "nan", "1e400", "wan", "hunyuan_video", "x" * 1000, "1.", "٣"])
    else:
        header = chance.choice([{}, {key: spec}, {"a": header}, [header], {key: None}, {key: {**spec, "dtype": 3}}])
    if isinstance(header, dict) and kind != 8:
        header = {"__metadata__": said, **header}
    text = json.dumps(header).encode()
    # CLIP's features say their dtype wrongly as they are, so half precision of either kind cannot be told apart
    return bytearray(len(text).to_bytes(8, "little") + text + data[start:]), kind == 1 and key.startswith("clip_")


def other_file(data, chance, folder):
    """Another file of the folder in its place."""
    del data
    return bytearray(chance.choice(sorted(folder.iterdir())).read_bytes()), False


def same(found, wanted, finite):
    """Whether a sample is as it was; with damaged values at least in shape, and finite."""
    if found.keys() != wanted.keys():
        return False
    for name, tensor in found.items():
        if finite:
            if tensor.shape[1:] != wanted[name].shape[1:] or not torch.isfinite(tensor).all():
                return False
        elif tensor.shape != wanted[name].shape or not torch.equal(tensor, wanted[name]):
            return False
    return True


BYTES = [flip_header, flip_anything, cut, grow, overwrite, length, edit, edit, edit]


@pytest.mark.slow
@pytest.mark.parametrize("write", [video, padded, images, first_frames])
def test_damaged_files_are_refused_by_name_or_harmless(write, tmp_path):
    folder = tmp_path / "cache"
    arch = model(write(folder))
    wanted, left_out = everything(folder, arch)
    assert left_out == ()
    chance = random.Random(write.__name__)
    originals = {path: ordered(path.read_bytes()) for path in sorted(folder.iterdir())}
    refused = harmless = 0
    for _ in range(ROUNDS):
        path = chance.choice(list(originals))
        if chance.random() < 0.05:
            data, damaged = other_file(None, chance, folder)
            if data == originals[path]:
                continue
            # its own samples may be read in its place where the names agree
            damaged = True
        else:
            data, damaged = chance.choice(BYTES)(bytearray(originals[path]), chance)
        path.write_bytes(data)
        try:
            found, left_out = everything(folder, arch)
        except ValueError as error:
            refused += 1
            assert path.stem in str(error), error
        else:
            harmless += 1
            assert left_out == ()
            assert found.keys() == wanted.keys()
            assert all(same(found[key], wanted[key], damaged) for key in wanted), (path.name, data[:400])
        path.write_bytes(originals[path])
    assert refused > ROUNDS // 2
    assert harmless > ROUNDS // 50


@pytest.mark.slow
@pytest.mark.parametrize("write", [video, padded, images, first_frames])
def test_renamed_files_are_refused_by_name_or_said(write, tmp_path):
    folder = tmp_path / "cache"
    arch = model(write(folder))
    wanted, _ = everything(folder, arch)
    chance = random.Random(write.__name__)
    names = sorted(path.name for path in folder.iterdir())
    for _ in range(ROUNDS // 8):
        name = chance.choice(names)
        letters = list(name)
        for _ in range(chance.randint(1, 2)):
            location = chance.randrange(len(letters))
            kind = chance.randrange(3)
            if kind == 0:
                letters[location] = chance.choice("_x09a.-")
            elif kind == 1:
                letters.insert(location, chance.choice("_x09a.-"))
            else:
                del letters[location]
        new = "".join(letters)
        if new in names or not new.strip("."):
            continue
        shutil.move(folder / name, folder / new)
        try:
            found, left_out = everything(folder, arch)
        except ValueError as error:
            assert any(stem.removesuffix(".safetensors") in str(error) for stem in (name, new)), (name, new, error)
        else:
            missing = wanted.keys() - found.keys()
            strange = found.keys() - wanted.keys()
            assert all(same(found[key], wanted[key], finite=False) for key in found.keys() & wanted.keys())
            # an item renamed to one whose text is there trains under that text: the name says so
            assert len(strange) <= len(missing) <= 1
            if missing and not strange:
                stem = new.removesuffix(".safetensors")
                assert (
                    stem in "".join(left_out) or "architecture" in "".join(left_out) or not new.endswith(".safetensors")
                )
        shutil.move(folder / new, folder / name)
