"""What is private to a library and used all the same: when one changes, it says so here, with its name."""

import inspect
import re
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from diffusers.utils import peft_utils
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import subprocess_script
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel, T5EncoderModel

SOURCE = Path(__file__).parents[2] / "src" / "mpp"
CALLED = [  # class in diffusers or itself, name, parameters that calls rely on
    ("FluxPipeline", "_pack_latents", "latents, batch_size, num_channels_latents, height, width"),
    ("FluxPipeline", "_unpack_latents", "latents, height, width, vae_scale_factor"),
    ("FluxKontextPipeline", "_unpack_latents", "latents, height, width, vae_scale_factor"),
    ("FluxPipeline", "_prepare_latent_image_ids", "batch_size, height, width, device, dtype"),
    ("Flux2Pipeline", "_pack_latents", "latents"),
    ("Flux2Pipeline", "_prepare_latent_ids", "latents"),
    ("Flux2Pipeline", "_prepare_image_ids", "image_latents"),
    ("Flux2Pipeline", "_prepare_text_ids", "x"),
    ("Flux2Pipeline", "_patchify_latents", "latents"),
    ("Flux2Pipeline", "_unpatchify_latents", "latents"),
    ("Flux2KleinPipeline", "_unpatchify_latents", "latents"),
    (Flux2ImageProcessor, "_resize_if_exceeds_area", "image"),
    ("HunyuanVideo15Pipeline", "_get_mllm_prompt_embeds", "text_encoder, tokenizer, prompt, device"),
    ("HunyuanVideo15Pipeline", "_get_byt5_prompt_embeds", "tokenizer, text_encoder, prompt, device"),
    ("HunyuanVideo15ImageToVideoPipeline", "_get_image_embeds", "image_encoder, feature_extractor, image, device"),
    ("Kandinsky5T2VPipeline", "_get_scale_factor", "self, height, width"),
    ("LTX2Pipeline", "_pack_latents", "latents"),
    ("LTX2Pipeline", "_unpack_latents", "latents, num_frames, height, width"),
    ("LTX2Pipeline", "_normalize_latents", "latents, latents_mean, latents_std, scaling_factor"),
    ("QwenImageLayeredPipeline", "_pack_latents", "latents, batch_size, num_channels_latents, height, width, layers"),
    ("QwenImageLayeredPipeline", "_unpack_latents", "latents, height, width, layers, vae_scale_factor"),
    ("QwenImageLayeredPipeline", "_encode_vae_image", "self, image, generator"),
    ("QwenImageEditPipeline", "_encode_vae_image", "self, image, generator"),
    ("QwenImageEditPlusPipeline", "_encode_vae_image", "self, image, generator"),
    (peft_utils, "_create_lokr_config", "state_dict, metadata"),
    (DistributedDataParallel, "_set_params_and_buffers_to_ignore_for_model", "module, params_and_buffers_to_ignore"),
    (subprocess_script, "_launch_process_observer", "child_processes"),
    (ConfigLoaderImpl, "_apply_overrides_to_config", "overrides, cfg"),
    (torch.nn.Module, "_apply", "self, fn"),
]
READ = {
    "_actions",  # of argparse's parsers
    "_keys_to_ignore_on_load_unexpected",
    "_keep_in_fp32_modules",
    "_keep_in_fp32_modules_strict",
    "_is_hf_initialized",  # set; tests/models/test_encoder_memory.py finds weights that were drawn anew
    "_disable_adapters",
    "_ddp_kwargs",
    "_signal_connector",
    "_repeated_blocks",
}
READ |= {"_batches_that_stepped"}
READ |= {  # of torch, which tests/training/test_costs.py would tell
    "_version",
    "_current_graph_task_id",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
}


@pytest.mark.parametrize(("owner", "name", "parameters"), CALLED, ids=lambda value: getattr(value, "__name__", value))
def test_a_private_function_is_there_and_takes_what_it_took(owner, name, parameters):
    kind = getattr(diffusers, owner) if isinstance(owner, str) else owner
    function = getattr(kind, name, None)
    assert function is not None, f"{kind.__name__} of this version has no {name}"
    found = list(inspect.signature(function).parameters.values())
    wanted = parameters.split(", ")
    assert [parameter.name for parameter in found[: len(wanted)]] == wanted
    needed = [parameter.name for parameter in found[len(wanted) :] if parameter.default is inspect.Parameter.empty]
    assert needed == [], f"{kind.__name__}.{name} of this version wants more"


def test_private_attributes_are_there_and_mean_what_they_meant():
    for name, member in (("_keys_to_ignore_on_load_unexpected", "norm_added_q"), ("_keep_in_fp32_modules", "norm1")):
        found = getattr(diffusers.WanTransformer3DModel, name, None)
        assert member in (found or ()), f"WanTransformer3DModel of this version has {name} = {found}"
    assert "WanTransformerBlock" in diffusers.WanTransformer3DModel._repeated_blocks
    assert "wo" in T5EncoderModel._keep_in_fp32_modules
    assert PreTrainedModel._keep_in_fp32_modules_strict is None
    layer = inject_adapter_in_model(LoraConfig(target_modules=["0"]), torch.nn.Sequential(torch.nn.Linear(2, 2)))[0]
    assert isinstance(layer, BaseTunerLayer)
    for off in (True, False):
        layer._disable_adapters = off
        assert layer.disable_adapters is off
    assert DDPStrategy(find_unused_parameters=True)._ddp_kwargs == {"find_unused_parameters": True}
    trainer = Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, accelerator="cpu")
    assert trainer.fit_loop.epoch_loop._batches_that_stepped == 0
    for name in ("register_signal_handlers", "teardown"):
        assert list(inspect.signature(getattr(trainer._signal_connector, name)).parameters) == []


def test_nothing_private_is_used_that_is_not_listed_here():
    used = set()
    for path in SOURCE.rglob("*.py"):
        lines = [line for line in path.read_text().splitlines() if "noqa: SLF001" in line]
        used |= {name for line in lines for name in re.findall(r"\.(_[a-z]\w+)", line.split("#")[0])}
    listed = READ | {name for _, name, _ in CALLED}
    assert used <= listed, f"add {used - listed}"
    assert listed - used == {"_encode_vae_image"}, "which is overridden, not called"
