"""What musubi-tuner caches of a VAE's output is, once read, what our own encoders cache of it."""

import inspect

import pytest
import torch

from mpp.musubi.cache import MusubiCache
from tests.families import variants
from tests.families.base import architecture, pixels
from tests.musubi import stored as fixtures

VARIANTS = {variant.name: variant for variant in variants()}


def build(name, built):
    """The variant's architecture, its encoders, and a clip."""
    variant = VARIANTS[name]
    arch = architecture(variant, built(variant))
    encoders = arch.load_encoders("cpu")
    if arch.family.startswith("hunyuan"):  # the published VAE's scale, which diffusers' class has by default
        published = inspect.signature(type(encoders.vae()).__init__).parameters["scaling_factor"].default
        encoders.vae().register_to_config(scaling_factor=published)
    return arch, encoders, pixels(arch, variant, (2, 3), 0)


def sizes(tensor):
    return "x".join(map(str, tensor.shape[1:]))


@pytest.mark.parametrize(
    ("name", "short", "text"),
    [
        ("HunyuanVideo T2V", "hv", fixtures.hv().text),
        ("HunyuanVideo 1.5 T2V", "hv15", fixtures.hv15().text),
        ("Z-Image", "zi", fixtures.z_image().text),
    ],
)
@torch.no_grad()
def test_latents_as_the_vae_makes_them_become_ours(name, short, text, built, tmp_path):
    """These three are cached without the VAE's scale: `latent_dist.sample()` or `mode()` and nothing more."""
    arch, encoders, clip = build(name, built)
    frames = clip[:, :, 0] if short == "zi" else clip
    raw = encoders.vae().encode(frames).latent_dist.mode()[0]
    key = f"latents_1x{sizes(raw)}_float32" if short == "zi" else f"latents_{sizes(raw)}_float32"
    fixtures.Made({key: raw}, text).write(tmp_path / "cache", short)
    cache = MusubiCache(tmp_path / "cache", arch)
    (entry,) = cache.entries()
    assert torch.equal(cache.latents(entry), encoders.encode_pixels(clip)[0])


@torch.no_grad()
def test_first_frames_of_wan_are_stored_as_we_prepare_them(built, tmp_path):
    """wan_cache_latents.py: ones for the first pixel frame, of which there are four, then the padded clip's latents."""
    arch, encoders, clip = build("WAN 2.2 A14B I2V low", built)
    vae = encoders.vae()
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    normalised = (vae.encode(clip).latent_dist.mode() - mean) / std
    alone = torch.cat([clip[:, :, :1], torch.zeros_like(clip[:, :, 1:])], 2)
    first = (vae.encode(alone).latent_dist.mode() - mean) / std
    cells = first.shape[-2:]
    mask = torch.ones(1, clip.shape[2], *cells)
    mask[:, 1:] = 0
    mask = torch.cat([mask[:, :1].repeat_interleave(4, 1), mask[:, 1:]], 1).view(1, -1, 4, *cells).transpose(1, 2)
    stored = torch.cat([mask, first], 1)[0]
    name = sizes(normalised[0])
    tensors = {f"latents_{name}_float32": normalised[0], f"latents_image_{name}_float32": stored}
    fixtures.Made(tensors, fixtures.wan().text).write(tmp_path / "cache", "wan")
    cache = MusubiCache(tmp_path / "cache", arch)
    (entry,) = cache.entries()
    assert torch.equal(cache.latents(entry), encoders.encode_pixels(clip)[0])
    found = cache.conditioning(entry, arch.conditioning).condition
    ours = encoders.encode_images(clip, ())["condition"]
    assert torch.allclose(found, ours, atol=1e-6)
    assert torch.equal(found[:4], ours[:4])


@torch.no_grad()
def test_first_frames_of_hunyuan_video_15_are_ours_from_their_own_encoding(built, tmp_path):
    """hv_1_5_cache_latents.py: the first frame alone as the VAE makes it, before zeros, above a mask of ones."""
    arch, encoders, clip = build("HunyuanVideo 1.5 I2V", built)
    vae = encoders.vae()
    raw, alone = (vae.encode(part).latent_dist.mode()[0] for part in (clip, clip[:, :, :1]))
    stored = torch.zeros(33, *raw.shape[1:])
    stored[:32, :1], stored[32, 0] = alone, 1
    embeds = encoders.encode_images(clip, ())["image_embeds"]
    tensors = {
        f"latents_{sizes(raw)}_float32": raw,
        f"latents_image_{sizes(raw)}_float32": stored,
        "siglip_float32": embeds,
    }
    fixtures.Made(tensors, fixtures.hv15().text).write(tmp_path / "cache", "hv15")
    cache = MusubiCache(tmp_path / "cache", arch)
    (entry,) = cache.entries()
    found = cache.conditioning(entry, arch.conditioning)
    ours = encoders.encode_images(clip, ())
    assert torch.equal(found.image_latents, ours["image_latents"])
    assert torch.equal(found.image_embeds, ours["image_embeds"])


@torch.no_grad()
def test_patches_of_flux2_lie_as_ours(built, tmp_path):
    """flux2_models.py: `c (i pi) (j pj) -> (c pi pj) i j` of the mean, then the batch norm in eval mode."""
    arch, encoders, clip = build("FLUX.2 dev", built)
    vae = encoders.vae()
    mode = vae.encode(clip[:, :, 0]).latent_dist.mode()[0]
    channels, rows, columns = (size // part for size, part in zip(mode.shape, (1, 2, 2), strict=True))
    patches = torch.empty(4 * channels, rows, columns)
    for c in range(channels):
        for pi in range(2):
            for pj in range(2):
                patches[c * 4 + pi * 2 + pj] = mode[c, pi::2, pj::2]
    norm = torch.nn.functional.batch_norm(patches[None], vae.bn.running_mean, vae.bn.running_var, eps=1e-4)[0]
    made = fixtures.Made({f"latents_{rows}x{columns}_float32": norm}, fixtures.flux2().text)
    made.write(tmp_path / "cache", "f2d")
    cache = MusubiCache(tmp_path / "cache", arch)
    (entry,) = cache.entries()
    assert torch.allclose(cache.latents(entry), encoders.encode_pixels(clip)[0], atol=1e-5)
