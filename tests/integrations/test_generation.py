"""transformers' decoders with their caches: the same blocks as without, and the same text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import replfx

pytestmark = pytest.mark.integrations
transformers = pytest.importorskip("transformers")

IDS = torch.arange(3, 23).view(2, 10)
_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 5,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 63,
    "decoder_start_token_id": 1,
}
_ENCODER = {"d_model": 32, "encoder_layers": 5, "decoder_layers": 5, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
_HEADS = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "forced_eos_token_id": None}
# model type → what it needs beside
DECODERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 4},
    "gemma": {},
    "gemma2": {"sliding_window": 4},
    "gpt2": {"n_layer": 5, "n_embd": 32, "n_head": 4},
    "gpt_neox": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": {"num_key_value_heads": 4},
    "falcon": {},
    "bloom": {"n_layer": 5, "n_head": 4},
}
PAIRS: dict[str, dict[str, Any]] = {
    "t5": {
        "d_model": 32,
        "d_ff": 64,
        "num_layers": 5,
        "num_decoder_layers": 5,
        "num_heads": 4,
        "d_kv": 8,
        "decoder_start_token_id": 1,
    },
    "bart": {**_ENCODER, **_HEADS},
}


def built(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind]
    known = config().to_dict()
    fields = {**{key: value for key, value in _SMALL.items() if key in known}, **{**DECODERS, **PAIRS}[kind]}
    auto = transformers.AutoModelForSeq2SeqLM if kind in PAIRS else transformers.AutoModelForCausalLM
    return auto.from_config(config(**fields, **options)).eval()


def inputs(kind: str) -> dict[str, torch.Tensor]:
    return {"input_ids": IDS, **({"decoder_input_ids": IDS[:, :7]} if kind in PAIRS else {})}


@pytest.mark.parametrize("operator", ["block", "mixer", "light", "identity"])
@pytest.mark.parametrize("kind", [*DECODERS, *PAIRS])
def test_a_cache_changes_neither_the_blocks_nor_the_text(kind: str, operator: str) -> None:
    found = [replfx.inspect(built(kind, **o), inputs(kind), operator=operator) for o in ({}, {"use_cache": False})]
    assert found[0].replaced == found[1].replaced
    if not found[0].replaced:
        assert f"operator {operator!r} does not fit it" in " ".join(found[0].refused.values())
        return
    made = replfx.transform(built(kind), inputs(kind), operator=operator)
    length = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    for model in (made, replfx.materialize(made)):
        for options in ({}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}):
            shared = {key: value for key, value in options.items() if key == "num_beams"}
            wanted = model.generate(input_ids=IDS, use_cache=False, **length, **shared)
            assert torch.equal(model.generate(input_ids=IDS, use_cache=True, **length, **options), wanted)


def test_the_first_layer_left_out() -> None:
    """It is the one that the model asks how many tokens there are."""
    made = replfx.transform(built("llama"), inputs("llama"), operator="identity", select="model.layers.0")
    length = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached, whole = (made.generate(input_ids=IDS, use_cache=use, **length) for use in (True, False))
    assert torch.equal(cached, whole)
