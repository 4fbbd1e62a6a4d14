"""Small models of libraries that people build on: vit-pytorch, x-transformers, diffusers, MONAI, SMP, OpenCLIP, YOLO.

Each is built by the library's own class, narrow, and deep enough to have three blocks in a row.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.zoo.subject import Inputs, Subject, Variant

SOURCE = "others"

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How a model is built and fed.

    Attributes:
        maker: "module:name" of the class or function.
        options: for it.
        inputs: draws what it takes.
    """

    maker: str
    options: Options
    inputs: Callable[[], Inputs]

    def build(self) -> nn.Module:
        """Build it."""
        module, _, name = self.maker.partition(":")
        model: nn.Module = getattr(importlib.import_module(module), name)(**self.options)
        return model


def names(store: Path, on_count: Callable[[int, int], object] = lambda done, total: None) -> list[str]:
    """Names of the subjects."""
    return [f"{SOURCE}:{library}/{model}" for library, models in LIBRARIES.items() for model in models]


def subject(name: str) -> Subject:
    """A model by its name."""
    library, _, model = name.partition(":")[2].partition("/")
    recipe = LIBRARIES[library][model]
    return Subject(name, library, (Variant("small", recipe.build, recipe.inputs),))


# ---- what they take


def _images(*shape: int) -> Callable[[], Inputs]:
    return partial(torch.randn, *shape)


def _tokens(length: int) -> Callable[[], Inputs]:
    return partial(torch.randint, 50, (2, length))


def _images_and_tokens() -> Inputs:
    return torch.randn(2, 3, 32, 32), torch.randint(50, (2, 16))


def _latents(*shape: int, steps: int = 2, **more: tuple[int, ...]) -> Callable[[], Inputs]:
    """A diffusion transformer's: latents, time steps, and numbers of these shapes besides."""

    def draw() -> Inputs:
        others = {name: torch.randn(size) for name, size in more.items()}
        return {"hidden_states": torch.randn(shape), "timestep": torch.arange(1, steps + 1), **others}

    return draw


def _classes() -> Inputs:
    time, labels = torch.tensor([1, 2]), torch.tensor([0, 1])
    return {"hidden_states": torch.randn(2, 4, 8, 8), "timestep": time, "class_labels": labels}


def _noised(*shape: int, context: int = 0) -> Callable[[], Inputs]:
    def draw() -> Inputs:
        more = {"encoder_hidden_states": torch.randn(2, 5, context)} if context else {}
        return {"sample": torch.randn(shape), "timestep": torch.tensor([1, 2]), **more}

    return draw


# ---- the libraries

_SMALL: Options = {
    "image_size": 32,
    "patch_size": 8,
    "num_classes": 10,
    "dim": 32,
    "depth": 6,
    "heads": 2,
    "mlp_dim": 64,
}
_PYRAMID: Options = {"num_classes": 10, "depth": (3, 3, 4, 3)}


def _vit(maker: str, side: int = 32, **options: Any) -> Recipe:
    return Recipe(f"vit_pytorch.{maker}", options, _images(2, 3, side, side))


_VIT_PYTORCH: dict[str, Recipe] = {
    "ViT": _vit("vit:ViT", **_SMALL),
    "SimpleViT": _vit("simple_vit:SimpleViT", **_SMALL),
    "DeepViT": _vit("deepvit:DeepViT", **_SMALL),
    "CaiT": _vit("cait:CaiT", **_SMALL, cls_depth=3),
    "XCiT": _vit("xcit:XCiT", **_SMALL, cls_depth=3),
    "RvT": _vit("rvt:RvT", **_SMALL),
    "JumboViT": _vit("jumbo_vit:JumboViT", **_SMALL),
    "ViT, patch merger": _vit("vit_with_patch_merger:ViT", **_SMALL),
    "ViT, small dataset": _vit("vit_for_small_dataset:ViT", **_SMALL),
    "ViT, memory": _vit("learnable_memory_vit:ViT", **_SMALL),
    "ViT, adaptive tokens": _vit("ats_vit:ViT", **_SMALL, max_tokens_per_depth=(16, 14, 12, 10, 8, 6)),
    "SimpleViT, registers": _vit("simple_vit_with_register_tokens:SimpleViT", **_SMALL),
    "SimpleViT, QK norm": _vit("simple_vit_with_qk_norm:SimpleViT", **_SMALL),
    "CCT": _vit(
        "cct:CCT", img_size=32, embedding_dim=32, n_conv_layers=1, kernel_size=3, stride=2, padding=1, num_layers=6,
        num_heads=2, mlp_ratio=2.0, num_classes=10,
    ),
    "PiT": _vit("pit:PiT", 64, **{**_SMALL, "image_size": 64, "depth": (3, 3, 3)}),
    "LeViT": _vit(
        "levit:LeViT", 64, image_size=64, num_classes=10, stages=3, dim=(32, 48, 64), depth=4, heads=(2, 2, 2),
        mlp_mult=2,
    ),
    "CvT": _vit(
        "cvt:CvT", 64, num_classes=10, s1_emb_dim=16, s2_emb_dim=32, s3_emb_dim=32, s1_depth=3, s2_depth=3, s3_depth=5,
        s1_heads=1, s2_heads=2, s3_heads=2,
    ),
    "NesT": _vit(
        "nest:NesT", image_size=32, patch_size=4, dim=16, heads=2, num_hierarchies=3, block_repeats=(3, 3, 5),
        num_classes=10,
    ),
    "MaxViT": _vit("max_vit:MaxViT", 64, **_PYRAMID, dim_conv_stem=16, dim=16, dim_head=8, window_size=2),
    "RegionViT": _vit("regionvit:RegionViT", 64, **_PYRAMID, dim=(16, 16, 32, 32), window_size=2),
    "ScalableViT": _vit(
        "scalable_vit:ScalableViT", 64, **_PYRAMID, dim=16, heads=(1, 2, 2, 2), ssa_dim_key=(16, 16, 16, 16),
        reduction_factor=(4, 2, 1, 1), window_size=(8, 4, None, None),
    ),
}  # fmt: skip


def _decoder(**options: Any) -> nn.Module:
    library: Any = importlib.import_module("x_transformers")
    layers = library.Decoder(dim=32, depth=6, heads=2, attn_dim_head=16, **options)
    model: nn.Module = library.TransformerWrapper(num_tokens=50, max_seq_len=32, attn_layers=layers)
    return model


def _decoders(**variants: Options) -> dict[str, Recipe]:
    return {name: Recipe(f"{__name__}:_decoder", options, _tokens(16)) for name, options in variants.items()}


_X_TRANSFORMERS = _decoders(
    plain={},
    rotary={"rotary_pos_emb": True},
    glu={"ff_glu": True, "ff_swish": True},
    rms_norm={"use_rmsnorm": True, "ff_no_bias": True},
    alibi={"alibi_pos_bias": True},
    sandwich={"sandwich_coef": 2},
    macaron={"macaron": True},
    qk_norm={"attn_qk_norm": True},
    one_kv_head={"attn_kv_heads": 1},
    post_norm={"pre_norm": False, "residual_attn": True},
    gated={"gate_residual": True},
    shifted={"shift_tokens": 1},
    hyper={"num_residual_streams": 4},
    layer_drop={"layer_dropout": 0.2},
    value_residual={"add_value_residual": True},
)

_JOINT: Options = {"attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32}
_DIFFUSERS: dict[str, Recipe] = {
    "DiT": Recipe(
        "diffusers:DiTTransformer2DModel",
        {
            "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "num_layers": 5,
            "sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 10,
        },
        _classes,
    ),
    "SD3": Recipe(
        "diffusers:SD3Transformer2DModel",
        {
            **_JOINT, "sample_size": 8, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 5,
            "caption_projection_dim": 32, "pooled_projection_dim": 32,
        },
        _latents(2, 4, 8, 8, encoder_hidden_states=(2, 5, 32), pooled_projections=(2, 32)),
    ),
    "Flux": Recipe(
        "diffusers:FluxTransformer2DModel",
        {
            **_JOINT, "patch_size": 1, "in_channels": 4, "num_layers": 4, "num_single_layers": 5,
            "pooled_projection_dim": 32, "axes_dims_rope": (4, 4, 8),
        },
        _latents(
            2, 16, 4, encoder_hidden_states=(2, 5, 32), pooled_projections=(2, 32), img_ids=(16, 3), txt_ids=(5, 3)
        ),
    ),
    "Wan": Recipe(
        "diffusers:WanTransformer3DModel",
        {
            "patch_size": (1, 2, 2), "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4,
            "out_channels": 4, "text_dim": 32, "freq_dim": 32, "ffn_dim": 32, "num_layers": 5,
        },
        _latents(1, 4, 2, 8, 8, steps=1, encoder_hidden_states=(1, 5, 32)),
    ),
    "UNet2D": Recipe(
        "diffusers:UNet2DModel",
        {
            "sample_size": 32, "block_out_channels": (32, 32, 64), "layers_per_block": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        },
        _noised(2, 3, 32, 32),
    ),
    "UNet2D, conditioned": Recipe(
        "diffusers:UNet2DConditionModel",
        {
            "sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 4, "cross_attention_dim": 32,
            "attention_head_dim": 2, "norm_num_groups": 8, "transformer_layers_per_block": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        },
        _noised(2, 4, 16, 16, context=32),
    ),
    "AutoencoderKL": Recipe(
        "diffusers:AutoencoderKL",
        {
            "block_out_channels": (32, 32), "layers_per_block": 4, "norm_num_groups": 8,
            "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
        _images(1, 3, 32, 32),
    ),
}  # fmt: skip


def _net(name: str, *shape: int, **options: Any) -> Recipe:
    return Recipe(f"monai.networks.nets:{name}", {"spatial_dims": len(shape) - 2, **options}, _images(*shape))


_MONAI: dict[str, Recipe] = {
    "ViT": _net(
        "ViT", 2, 1, 32, 32, in_channels=1, img_size=(32, 32), patch_size=8, hidden_size=32, mlp_dim=64, num_layers=6,
        num_heads=2, classification=True, num_classes=4,
    ),
    "UNETR": _net(
        "UNETR", 1, 1, 32, 32, in_channels=1, out_channels=2, img_size=(32, 32), feature_size=4, hidden_size=32,
        mlp_dim=64, num_heads=2,
    ),
    "SwinUNETR": _net(
        "SwinUNETR", 1, 1, 64, 64, in_channels=1, out_channels=2, feature_size=12, depths=(3, 3, 3, 3)
    ),
    "SegResNet": _net(
        "SegResNet", 1, 1, 32, 32, init_filters=8, in_channels=1, out_channels=2, blocks_down=(1, 3, 3, 4)
    ),
    "UNet": _net(
        "UNet", 1, 1, 32, 32, in_channels=1, out_channels=2, channels=(8, 8, 16, 16), strides=(2, 2, 2),
        num_res_units=4,
    ),
    "DynUNet": _net(
        "DynUNet", 1, 1, 64, 64, in_channels=1, out_channels=2, kernel_size=[3] * 5, strides=[1, 2, 2, 2, 2],
        upsample_kernel_size=[2] * 4, res_block=True,
    ),
    "DenseNet121": _net("DenseNet121", 2, 1, 64, 64, in_channels=1, out_channels=2),
    "MedNeXt": _net("MedNeXt", 1, 1, 32, 32, init_filters=8, in_channels=1, out_channels=2),
}  # fmt: skip


def _segmenter(architecture: str, encoder: str = "resnet34") -> Recipe:
    options = {"encoder_name": encoder, "encoder_weights": None, "classes": 3}
    return Recipe(f"segmentation_models_pytorch:{architecture}", options, _images(2, 3, 64, 64))


_SEGMENTERS = ("Unet", "UnetPlusPlus", "MAnet", "Linknet", "FPN", "PSPNet", "DeepLabV3Plus", "UPerNet", "Segformer")
_ENCODERS = ("mit_b2", "efficientnet-b3", "tu-convnext_tiny")
_SMP: dict[str, Recipe] = {
    **{architecture: _segmenter(architecture) for architecture in _SEGMENTERS},
    **{f"Unet, {encoder}": _segmenter("Unet", encoder) for encoder in _ENCODERS},
}

_TEXT: Options = {"context_length": 16, "vocab_size": 50, "width": 32, "heads": 2, "layers": 5}
_VISION: Options = {"layers": 5, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
_OPEN_CLIP: dict[str, Recipe] = {
    "CLIP": Recipe(
        "open_clip.model:CLIP", {"embed_dim": 32, "vision_cfg": _VISION, "text_cfg": _TEXT}, _images_and_tokens
    ),
}


def _yolo(name: str, kind: str = "DetectionModel") -> Recipe:
    options = {"cfg": f"{name}.yaml", "verbose": False}
    return Recipe(f"ultralytics.nn.tasks:{kind}", options, _images(1, 3, 64, 64))


_ULTRALYTICS: dict[str, Recipe] = {
    **{name: _yolo(name) for name in ("yolov5l", "yolov8l", "yolo11l", "yolo12l")},
    "yolov8l-cls": _yolo("yolov8l-cls", "ClassificationModel"),
}

LIBRARIES: dict[str, dict[str, Recipe]] = {
    "vit-pytorch": _VIT_PYTORCH,
    "x-transformers": _X_TRANSFORMERS,
    "diffusers": _DIFFUSERS,
    "monai": _MONAI,
    "segmentation-models-pytorch": _SMP,
    "open_clip": _OPEN_CLIP,
    "ultralytics": _ULTRALYTICS,
}
