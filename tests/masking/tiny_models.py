"""Segmentation models of the real classes, tiny and random, saved as their repositories have them."""

import json

import torch
from transformers import (
    CLIPSegConfig,
    CLIPSegForImageSegmentation,
    Sam2Config,
    Sam2Model,
    Sam2VideoConfig,
    Sam2VideoModel,
    SegformerConfig,
    SegformerForSemanticSegmentation,
)
from transformers.models.sam2.configuration_sam2 import Sam2HieraDetConfig, Sam2VisionConfig

from tests.families.parts import clip_text, seeded

SIDE = 128
LABELS = ("Background", "Hair", "Upper-clothes", "Face")
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


def _save(model, folder, processor, scale):
    """Weights wide enough that the image and the prompt matter, and the processor's settings beside them."""
    random = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=random) * scale
        elif name.endswith("pred_obj_score_head.proj_out.bias"):
            parameter.data.fill_(100.0)  # the subject is never out of sight, or masks would be empty
    model.eval().save_pretrained(folder)
    settings = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 2, "rescale_factor": 1 / 255}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | processor))
    return model


@seeded
def clipseg(folder):
    config = CLIPSegConfig(
        text_config={
            "vocab_size": 514, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "bos_token_id": 512, "eos_token_id": 513, "pad_token_id": 513,
        },
        vision_config={
            "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 32, "patch_size": 8,
        },
        projection_dim=16, reduce_dim=16, extract_layers=[0, 1], decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )  # fmt: skip
    size = {"height": 32, "width": 32}
    model = _save(
        CLIPSegForImageSegmentation(config), folder,
        {"image_processor_type": "ViTImageProcessor", "size": size, "image_mean": MEAN, "image_std": STD}, 0.3,
    )  # fmt: skip
    clip_text(folder / "text")
    for path in (folder / "text" / "tokenizer").iterdir():
        path.rename(folder / path.name)
    return model


def segformer(folder, **processor):
    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[7, 3], strides=[4, 2],
        num_attention_heads=[1, 2], mlp_ratios=[2, 2], decoder_hidden_size=16, id2label=dict(enumerate(LABELS)),
        label2id={name: number for number, name in enumerate(LABELS)},
    )  # fmt: skip
    settings = {
        "image_processor_type": "SegformerImageProcessor", "size": {"height": 64, "width": 64}, "image_mean": MEAN,
        "image_std": STD,
    } | processor  # fmt: skip
    return _save(SegformerForSemanticSegmentation(config), folder, settings, 0.3)


def _sam2_parts():
    backbone = Sam2HieraDetConfig(
        hidden_size=8, num_attention_heads=1, image_size=[SIDE, SIDE], blocks_per_stage=[1, 1, 2, 1],
        embed_dim_per_stage=[8, 16, 32, 64], num_attention_heads_per_stage=[1, 1, 1, 1],
        window_size_per_stage=[4, 4, 4, 4], window_positional_embedding_background_size=[4, 4],
        global_attention_blocks=[3],
    )  # fmt: skip
    vision = Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[64, 32, 16, 8],
        backbone_feature_sizes=[[SIDE // step] * 2 for step in (4, 8, 16)], fpn_hidden_size=128,
    )  # fmt: skip
    decoder = {
        "hidden_size": 128, "mlp_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "iou_head_hidden_dim": 32,
        "dynamic_multimask_via_stability": False,  # it would hide whether one mask was asked for or several
    }  # fmt: skip
    prompt = {"hidden_size": 128, "image_size": SIDE, "patch_size": 16, "mask_input_channels": 4}
    return {"vision_config": vision, "prompt_encoder_config": prompt, "mask_decoder_config": decoder}


SAM2 = {  # the processor's class needs torchvision, its settings do not
    "image_processor_type": "Sam2ImageProcessorFast",
    "processor_class": "Sam2VideoProcessor",
    "size": {"height": SIDE, "width": SIDE},
    "mask_size": {"height": SIDE // 4, "width": SIDE // 4},
    "image_mean": MEAN,
    "image_std": STD,
}


@seeded
def sam2(folder):
    return _save(Sam2Model(Sam2Config(**_sam2_parts())), folder, SAM2, 0.1)


@seeded
def sam2_video(folder):
    """As the hub's repositories: one set of weights for images and videos."""
    config = Sam2VideoConfig(
        **_sam2_parts(), image_size=SIDE, memory_attention_hidden_size=128, memory_attention_num_layers=1,
        memory_attention_feed_forward_hidden_size=32, memory_attention_rope_feat_sizes=[SIDE // 16] * 2,
        memory_encoder_hidden_size=128, memory_fuser_embed_dim=128, memory_fuser_intermediate_dim=32,
        memory_fuser_num_layers=1, mask_downsampler_embed_dim=128,
    )  # fmt: skip
    return _save(Sam2VideoModel(config), folder, SAM2, 0.1)
