"""From our cache to musubi-tuner's files and back into a run, by the commands."""

import math
import random
import re
from pathlib import Path
from statistics import NormalDist

import pytest
import torch

import mpp.prepare
from mpp.cache.format import Cache
from mpp.config import build
from tests import helpers

GUIDE = (Path(__file__).parents[1] / "docs/musubi.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def exported(prepared, pipeline, tmp_path_factory):
    """The shared cache of eight images as musubi-tuner's files."""
    folder = tmp_path_factory.mktemp("musubi")
    summary = mpp.prepare.run(export(pipeline, prepared, f"export_dir={folder}"))
    assert summary.lines()[0] == f"{folder}: 8 samples of the architecture wan"
    return folder


def export(pipeline, cache, *overrides):
    settings = ["model=tiny_wan", f"model.pretrained={pipeline}", f"data.cache_dir={cache}", "export=musubi"]
    return helpers.config("prepare", [*settings, *overrides])


def run(pipeline, cache, out, *overrides):
    return helpers.train(
        pipeline, cache, out, "data=musubi", "loss=threshold", "data.batch_size=2", "trainer.max_steps=3", *overrides
    )


def test_a_run_on_exported_files_learns_what_a_run_on_the_cache_learns(exported, prepared, pipeline, tmp_path):
    from mpp.batching.datamodule import LatentDataModule

    model = helpers.architecture(pipeline)
    ours = LatentDataModule(architecture=model, cache_dir=str(prepared))
    theirs = LatentDataModule(architecture=model, cache_dir=str(exported), layout="musubi")
    for data in (ours, theirs):
        data.setup()
    assert len(theirs.train_entries) == len(ours.train_entries) == 8
    masks = [[float(data.cache.mask(e).mean()) for e in data.train_entries] for data in (ours, theirs)]
    assert sorted(masks[0]) == pytest.approx(sorted(masks[1]), abs=1e-3)  # half precision
    _, module = run(pipeline, exported, tmp_path / "out")
    assert module.samples_seen > 0
    assert (tmp_path / "out" / "lora.safetensors").is_file()


def test_what_such_a_cache_cannot_do_is_refused(exported, pipeline, tmp_path):
    with pytest.raises(ValueError, match="each sample's own caption and no other"):
        run(pipeline, exported, tmp_path / "a", "data.caption_dropout=0.1")
    with pytest.raises(ValueError, match="the sources of the cache .* cannot be compared"):
        run(pipeline, exported, tmp_path / "b", "data.strict_masks=true")
    with pytest.raises(ValueError, match="data.layout"):
        helpers.train(pipeline, exported, tmp_path / "c", "data.layout=kohya")


def test_an_export_says_what_it_lacks(prepared, pipeline, tmp_path):
    with pytest.raises(ValueError, match="export=musubi needs a folder to write to; set export_dir"):
        mpp.prepare.run(export(pipeline, prepared))
    with pytest.raises(ValueError, match="export must be musubi, got 'kohya'"):
        mpp.prepare.run(export(pipeline, prepared, "export=kohya", f"export_dir={tmp_path}"))
    with pytest.raises(ValueError, match=r"no cache at .*nowhere"):
        mpp.prepare.run(export(pipeline, tmp_path / "nowhere", f"export_dir={tmp_path / 'x'}"))
    with pytest.raises(ValueError, match="is for an export; add export=musubi"):
        helpers.prepare(pipeline, tmp_path, f"export_dir={tmp_path}")
    assert Cache(prepared).entries()


def squash(x):
    return 1 / (1 + math.exp(-x))


def shifted(factor, t):
    return t * factor / (1 + (factor - 1) * t)


def line(x1, y1, x2, y2, x):
    return y1 + (y2 - y1) / (x2 - x1) * (x - x1)


def musubi_sigma(mode, level, o):
    """Sigma of `get_noisy_model_input_and_timesteps` (hv_train_network.py, training/) at a level in (0, 1)."""
    normal, (h, w) = NormalDist().inv_cdf(level), o["size"]
    logit = squash(o["sigmoid_scale"] * normal)
    packed = (h // 2) * (w // 2)
    if mode == "sigma":  # scheduler.timesteps[index], descending from 1000
        return 1 - int(1000 * (squash(o["logit_mean"] + o["logit_std"] * normal) if o["scheme"] else level)) / 1000
    return {
        "uniform": lambda: level,
        "sigmoid": lambda: logit,
        "shift": lambda: shifted(o["discrete_flow_shift"], logit),
        "flux_shift": lambda: shifted(math.exp(line(256, 0.5, 4096, 1.15, packed)), logit),
        "flux2_shift": lambda: shifted(math.exp(line(256, 0.5, 4096, 1.15, h * w)), logit),
        "qwen_shift": lambda: shifted(math.exp(line(256, 0.5, 8192, 0.9, packed)), logit),
        "krea2_shift": lambda: shifted(math.exp(line(256, 0.5, 6400, 1.15, packed)), logit),
        "ideogram4_shift": lambda: squash(0.5 * math.log(h * 16 * w * 16 / 512**2) + 1.5 * normal),
        "logsnr": lambda: squash(-(o["logit_mean"] + o["logit_std"] * normal) / 2),
    }[mode]()


def documented_laws():
    """Mode, whether logit-normal, settings and values of every line of the guide's table of laws."""
    table = GUIDE[GUIDE.index("| `--timestep_sampling`") :].split("\n\n")[0].splitlines()[2:]
    for row in table:
        modes, settings, values = (cell.strip() for cell in row.strip("|").split("|"))
        for mode in re.findall(r"`(\w+)`", modes):
            yield pytest.param(mode, "logit_normal" in modes, settings, values, id=modes)


@pytest.mark.parametrize(("mode", "scheme", "settings", "values"), list(documented_laws()))
def test_settings_of_the_guide_draw_sigma_as_musubi_tuner_does(mode, scheme, settings, values):
    drawn = random.Random(mode)
    names = ("sigmoid_scale", "discrete_flow_shift", "logit_std")
    o = {name: round(drawn.uniform(0.5, 3), 3) for name in names}
    o |= {
        "logit_mean": round(drawn.gauss(0, 1), 3),
        "scheme": scheme,
        "size": [2 * drawn.randint(16, 80) for _ in "hw"],
    }
    known = {**o, "height": o["size"][0], "width": o["size"][1], "sqrt": math.sqrt}
    words = re.findall(r"model\.[\w.]+=(?:\{[^}]*\}|[^\s`\"]+)", settings)
    assert len(words) == settings.count("model.")
    for letter, formula in re.findall(r"\b([A-Z]) = ([^,]+)", values):
        value = eval(formula, {"__builtins__": {}}, known)
        words = [re.sub(rf"={letter}$", f"={value}", word) for word in words]
    family = "flux2" if mode == "flux2_shift" else drawn.choice(["wan", "qwen_image", "flux"])
    model = build(helpers.config("train", [f"model={family}", "data.cache_dir=x", *words]).model)
    levels = sorted(drawn.random() for _ in range(200))
    falls = musubi_sigma(mode, 0.1, o) > musubi_sigma(mode, 0.9, o)
    want = [musubi_sigma(mode, 1 - level if falls else level, o) for level in levels]
    tokens = model.latents.tokens((1, *o["size"]))
    got = model.sigma.quantile(torch.tensor(levels, dtype=torch.float64), tokens).tolist()
    assert got == pytest.approx(want, abs=1.01e-3 if mode == "sigma" else 1e-9)


def test_a_range_with_its_shape_preserved_is_that_of_the_guide():
    drawn = random.Random(0)
    low, high = sorted(drawn.sample(range(50, 950), 2))
    o = {"sigmoid_scale": 1, "discrete_flow_shift": 3, "size": (64, 64)}
    count = 20_000
    every = [musubi_sigma("shift", (k + 0.5) / count, o) for k in range(count)]
    kept = [sigma for sigma in every if low / 1000 <= sigma <= high / 1000]
    assert {"`model.sigma.min_sigma=A/1000`", "`model.sigma.max_sigma=B/1000`"} <= set(re.findall("`[^`]*`", GUIDE))
    words = [f"model.sigma.min_sigma={low / 1000}", f"model.sigma.max_sigma={high / 1000}", "model.sigma.shift=3"]
    law = build(helpers.config("train", ["model=wan", "data.cache_dir=x", *words]).model).sigma
    levels = (torch.arange(len(kept)) + 0.5) / len(kept)
    assert law.quantile(levels.double(), 1).tolist() == pytest.approx(kept, abs=2e-4)


@pytest.mark.parametrize(("said", "told"), [("is musubi-tuner's default", 1), ("Tencent's", 6000)])
def test_hunyuan_video_is_told_the_guidance_of_the_guide(said, told):
    (word,) = re.findall(rf"`(model\.guidance=[\d.]+)`\s+{said}", GUIDE)
    model = build(helpers.config("train", ["model=hunyuan_video", "data.cache_dir=x", word]).model)
    heard = []

    class Transformer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.x_embedder = torch.nn.Module()
            self.x_embedder.proj = torch.nn.Linear(1, 1)

        def forward(self, hidden_states, guidance, **_):
            heard.append(guidance)
            return (hidden_states,)

    text = model.conditioning(torch.zeros(2, 3, 4), torch.zeros(2, 4), torch.ones(2, 3))
    model.velocity(Transformer(), torch.zeros(2, 16, 1, 2, 2), torch.tensor([0.3, 0.8]), text)
    assert heard[0].tolist() == pytest.approx([told, told])
