"""Small configurations of transformers' architectures, as data: what all share, and what each needs beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

LAYERS, WIDTH, HEADS, VOCABULARY, LENGTH = 6, 32, 4, 99, 16

_DEPTH = (
    "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_encoder_layers num_decoder_layers"
)
_WIDTHS = "hidden_size d_model n_embd dim emb_dim embedding_size embed_dim projection_dim attention_hidden_size"
_HEADS = (
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads"
)
_HIDDEN = (
    "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff ffn_hidden_size dim_feedforward n_inner "
    "encoder_intermediate_size hidden_dim moe_intermediate_size shared_expert_intermediate_size"
)
_LENGTHS = "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions"

# Set where a configuration has the field; the rest of its fields keep their defaults.
TINY: Mapping[str, object] = {
    **dict.fromkeys(_DEPTH.split(), LAYERS),
    **dict.fromkeys(_WIDTHS.split(), WIDTH),
    **dict.fromkeys(_HEADS.split(), HEADS),
    **dict.fromkeys(_HIDDEN.split(), 2 * WIDTH),
    **dict.fromkeys(_LENGTHS.split(), 64),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), 2),
    **dict.fromkeys(("head_dim", "d_kv"), WIDTH // HEADS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token"), 2),
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "image_size": 32,
    "patch_size": 8,
}

TEXT, TEXT_PAIR, IMAGE, WAVE, SPECTROGRAM, MEL_TO_TEXT, IMAGE_AND_TEXT = (
    "text",
    "text pair",
    "image",
    "wave",
    "spectrogram",
    "mel to text",
    "image and text",
)

_RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16, 16, 32],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage1", "stage2", "stage3", "stage4"],
}
_WAVE_STEM = {
    "conv_dim": [32, 32, 32],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_feat_extract_layers": 3,
}
_STAGES = {"depths": [2, 2, 6, 2], "image_size": 64}
_WINDOWS = {"embed_dim": 8, "num_heads": [2, 2, 4, 4], "window_size": 2, "patch_size": 2, **_STAGES}
_SWIN = {"model_type": "swin", "out_features": ["stage1", "stage2", "stage3", "stage4"], **_WINDOWS}
_PIXELS = {"feature_size": 32, "fpn_feature_size": 32, "mask_feature_size": 32, "num_queries": 10, "image_size": 64}
_DECODER = {"d_model": WIDTH, "decoder_layers": LAYERS, "decoder_attention_heads": HEADS, "decoder_ffn_dim": 2 * WIDTH}
_PYRAMID = {"hidden_sizes": [8, 16, 16, 32], "depths": [2, 2, 6, 2], "num_attention_heads": [1, 2, 2, 4]}
_LATENT = {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "q_lora_rank": 8, "kv_lora_rank": 8} | {
    "head_dim": 4,
    "first_k_dense_replace": 1,
}

# (automatic class, inputs) → model type → fields that it needs beside TINY.
ARCHITECTURES: dict[tuple[str, str], dict[str, dict[str, Any]]] = {
    ("AutoModelForCausalLM", TEXT): {
        "gpt2": {},
        "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
        "gpt_neox": {},
        "gptj": {"rotary_dim": 4},
        "gpt_bigcode": {},
        "gpt_oss": {},
        "openai-gpt": {},
        "codegen": {"rotary_dim": 4},
        "ctrl": {"dff": 2 * WIDTH},
        "xglm": {"attention_heads": HEADS},
        "biogpt": {},
        "opt": {"word_embed_proj_dim": WIDTH},
        "bloom": {},
        "mpt": {"max_seq_len": 64},
        "falcon": {},
        "persimmon": {},
        "llama": {},
        "mistral": {},
        "ministral": {},
        "mixtral": {},
        "qwen2": {},
        "qwen3": {},
        "qwen2_moe": {},
        "qwen3_moe": {},
        "qwen3_next": {},
        "gemma": {},
        "gemma2": {},
        "gemma3_text": {},
        "phi": {},
        "phi3": {},
        "phimoe": {},
        "stablelm": {},
        "olmo": {},
        "olmo2": {},
        "olmo3": {},
        "olmoe": {},
        "granite": {},
        "granitemoe": {},
        "cohere": {},
        "cohere2": {},
        "starcoder2": {},
        "glm": {},
        "glm4": {},
        "helium": {},
        "smollm3": {},
        "nemotron": {},
        "arcee": {},
        "ernie4_5": {},
        "exaone4": {},
        "seed_oss": {},
        "diffllama": {},
        "jetmoe": {},
        "deepseek_v2": _LATENT,
        "deepseek_v3": _LATENT | {"n_group": 1, "topk_group": 1},
        "mamba": {"state_size": 4},
        "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 1, "chunk_size": 8},
        "falcon_mamba": {"state_size": 4},
        "rwkv": {},
        "recurrent_gemma": {},
        "jamba": {},
        "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "attn_layer_indices": [2]},
        "lfm2": {},
        "xlnet": {},
    },
    ("AutoModelForMaskedLM", TEXT): {
        "bert": {},
        "roberta": {},
        "roberta-prelayernorm": {},
        "xlm-roberta": {},
        "camembert": {},
        "deberta": {},
        "deberta-v2": {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8},
        "modernbert": {},
        "electra": {},
        "distilbert": {},
        "albert": {},
        "mpnet": {},
        "convbert": {},
        "ernie": {},
        "esm": {"mask_token_id": 3},
        "fnet": {},
        "funnel": {"d_inner": 2 * WIDTH, "block_sizes": [2, 2, 2]},
        "ibert": {},
        "layoutlm": {},
        "longformer": {"attention_window": 8},
        "megatron-bert": {},
        "mobilebert": {},
        "nystromformer": {},
        "rembert": {},
        "roformer": {},
        "squeezebert": {},
        "big_bird": {},
        "xlm": {},
    },
    ("AutoModelForSeq2SeqLM", TEXT_PAIR): {
        "t5": {},
        "mt5": {},
        "umt5": {},
        "longt5": {},
        "switch_transformers": {},
        "bart": {},
        "mbart": {},
        "m2m_100": {},
        "pegasus": {},
        "pegasus_x": {},
        "marian": {},
        "blenderbot": {},
        "led": {"attention_window": 8},
        "prophetnet": {},
        "plbart": {},
    },
    ("AutoModelForImageClassification", IMAGE): {
        "vit": {},
        "vit_msn": {},
        "beit": {},
        "dinov2": {},
        "dinov2_with_registers": {},
        "ijepa": {},
        "swin": _WINDOWS,
        "swinv2": _WINDOWS,
        "focalnet": {"embed_dim": 8, "patch_size": 2, **_STAGES},
        "convnext": {"hidden_sizes": [8, 16, 32, 32], "depths": [2, 2, 6, 2], "patch_size": 4},
        "convnextv2": {"hidden_sizes": [8, 16, 32, 32], "depths": [2, 2, 6, 2], "patch_size": 4},
        "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 32], "depths": [2, 2, 6, 2]},
        "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16, 32, 32], "depths": [2, 2, 6, 2], "groups_width": 8},
        "mobilevit": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "patch_size": 2},
        "mobilevitv2": {"patch_size": 2, "image_size": 64},
        "mobilenet_v2": {"image_size": 64},
        "segformer": _PYRAMID | {"decoder_hidden_size": 16},
        "pvt": _PYRAMID | {"image_size": 64},
        "poolformer": {"hidden_sizes": [8, 16, 16, 32], "depths": [2, 2, 6, 2]},
        "cvt": {"embed_dim": [8, 16, 32], "num_heads": [1, 2, 4], "depth": [1, 2, 6]},
        "hiera": {"image_size": [64, 64], "embed_dim": 8, "num_heads": [1, 1, 2, 2], "patch_size": [7, 7]},
        "swiftformer": {"embed_dims": [8, 16, 16, 32], "image_size": 64},
        "bit": {"embedding_size": 32, "num_groups": 8, "hidden_sizes": [32, 32, 64, 64], "depths": [2, 2, 6, 2]},
        "efficientnet": {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 1.0, "hidden_dim": 320},
    },
    ("AutoModelForSemanticSegmentation", IMAGE): {
        "dpt": {"backbone_out_indices": [1, 2, 3, 5], "neck_hidden_sizes": [8, 8, 16, 16], "fusion_hidden_size": 16}
    },
    ("AutoModelForDepthEstimation", IMAGE): {"glpn": _PYRAMID | {"decoder_hidden_size": 16, "image_size": 64}},
    ("AutoModelForObjectDetection", IMAGE): {
        "detr": {"backbone_config": _RESNET, "image_size": 64},
        "conditional_detr": {"backbone_config": _RESNET, "image_size": 64},
        "deformable_detr": {"backbone_config": _RESNET, "image_size": 64},
        "yolos": {"image_size": [32, 32], "num_detection_tokens": 5},
        "rt_detr": {
            "backbone_config": _RESNET | {"out_features": ["stage2", "stage3", "stage4"]},
            "image_size": 64,
            "num_queries": 10,
            "encoder_in_channels": [16, 16, 32],
            "encoder_hidden_dim": 32,
            "decoder_in_channels": [32, 32, 32],
        },
    },
    ("AutoModelForUniversalSegmentation", IMAGE): {
        "maskformer": {"backbone_config": _SWIN, "decoder_config": {"model_type": "detr", **_DECODER}, **_PIXELS},
        "mask2former": {"backbone_config": _SWIN, **_PIXELS},
    },
    ("DeiTForImageClassification", IMAGE): {"deit": {}},
    ("LevitForImageClassification", IMAGE): {
        "levit": {"image_size": 64, "patch_size": 16, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 3, 4]}
    },
    ("ViTMAEForPreTraining", IMAGE): {"vit_mae": {"decoder_hidden_size": WIDTH, "decoder_num_hidden_layers": LAYERS}},
    ("AutoModelForCTC", WAVE): {
        "wav2vec2": _WAVE_STEM,
        "hubert": _WAVE_STEM,
        "wavlm": _WAVE_STEM,
        "unispeech": _WAVE_STEM,
        "unispeech-sat": _WAVE_STEM,
        "sew": _WAVE_STEM,
        "wav2vec2-conformer": _WAVE_STEM,
        "data2vec-audio": _WAVE_STEM,
    },
    ("AutoModelForAudioClassification", SPECTROGRAM): {
        "audio-spectrogram-transformer": {"max_length": 32, "num_mel_bins": 16, "patch_size": 4},
        "wav2vec2-bert": {"feature_projection_input_dim": 16},
    },
    ("AutoModelForSpeechSeq2Seq", MEL_TO_TEXT): {
        "whisper": {"num_mel_bins": 16, "max_source_positions": 16},
    },
    ("AutoModel", IMAGE_AND_TEXT): {
        "clip": {},
        "siglip": {},
        "chinese_clip": {},
        "clipseg": {},
        "altclip": {},
        "blip": {},
        "vilt": {},
    },
}
