"""transformers' language models: operators that fit them, folders with their plan, peft's usual calls."""

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import replfx
from tests.support.strategies import randomize

pytestmark = pytest.mark.integrations

TOKENS = torch.randint(1, 50, (2, 7), generator=torch.Generator().manual_seed(0))
_USUAL = {
    "num_hidden_layers": 5,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {"n_layer": 5, "n_embd": 8, "n_head": 2, "vocab_size": 50, "n_positions": 16}),
    "opt": ("OPTForCausalLM", {**_USUAL, "ffn_dim": 16, "word_embed_proj_dim": 8}),
    "bert": ("BertForMaskedLM", {**_USUAL, "intermediate_size": 16}),
    "llama": ("LlamaForCausalLM", {**_USUAL, "intermediate_size": 16}),
    "t5": (
        "T5ForConditionalGeneration",
        {"num_layers": 3, "d_model": 8, "d_ff": 16, "num_heads": 2, "d_kv": 4, "vocab_size": 50},
    ),
}


def language_model(name: str) -> Any:
    import transformers

    kind, fields = CONFIGS[name]
    if name == "gpt2":
        fields = {**fields, "bos_token_id": 1, "eos_token_id": 2}
    cls = getattr(transformers, kind)
    torch.manual_seed(0)
    return cls(cls.config_class(**fields)).eval()


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    return {"input_ids": TOKENS, **({"decoder_input_ids": TOKENS} if name == "t5" else {})}


def transformed(name: str, operator: str = "block", **options: Any) -> Any:
    model = replfx.transform(language_model(name), inputs_of(name), operator=operator, **options)
    randomize(model, 1)
    return model.eval()


def logits(model: nn.Module, name: str) -> torch.Tensor:
    return model(**inputs_of(name)).logits


# ---- operators


@pytest.mark.parametrize("operator", ["block", "mixer", "light"])
@pytest.mark.parametrize("name", ["gpt2", "opt", "llama"])
def test_every_operator_fits_pre_norm_blocks(name: str, operator: str) -> None:
    """Also GPT-2's, whose maps are transposed linear layers of transformers' own."""
    assert len(replfx.report(transformed(name, operator)).replaced) == 2


@pytest.mark.parametrize("operator", ["mixer", "light"])
def test_post_norm_blocks_are_refused_with_the_reason(operator: str) -> None:
    assert len(replfx.report(transformed("bert")).replaced) == 2
    with pytest.raises(replfx.NoChainError, match="not a sum with its own input as a term"):
        transformed("bert", operator)


# ---- folders


@pytest.mark.parametrize("of", [lambda model: model, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize(("name", "operator"), [("gpt2", "light"), ("bert", "block"), ("t5", "mixer")])
def test_a_folder_has_the_plan_beside_the_weights(
    name: str, operator: str, of: Callable[[Any], Any], tmp_path: Path
) -> None:
    model = transformed(name, operator)
    expected, random = logits(model, name), torch.get_rng_state()
    of(model).save_pretrained(tmp_path)
    again = replfx.from_pretrained(tmp_path)
    assert isinstance(again, type(language_model(name)))
    assert not again.training
    assert replfx.plan_of(again) == replfx.plan_of(model)
    assert torch.equal(logits(again, name), expected)
    assert torch.equal(torch.get_rng_state(), random)
    assert again.state_dict().keys() == model.state_dict().keys()
    assert not hasattr(again.config, "replfx_plan")
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight


def test_a_plain_read_of_it_fails_and_says_what_to_call(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GPT2LMHeadModel

    transformed("gpt2").save_pretrained(tmp_path)
    for cls in (AutoModelForCausalLM, GPT2LMHeadModel):
        with pytest.raises(ValueError, match=r"use replfx\.from_pretrained\(folder\)"):
            cls.from_pretrained(tmp_path)


def test_shards_and_one_file_may_follow_each_other_in_a_folder(tmp_path: Path) -> None:
    for seed, size in enumerate(["5GB", "5KB", "5GB"]):
        model = transformed("llama")
        randomize(model, seed)
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert torch.equal(logits(replfx.from_pretrained(tmp_path), "llama"), logits(model, "llama"))
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    next(tmp_path.glob("model-0*.safetensors")).unlink()
    with pytest.raises(replfx.StateDictError, match=r"has no model-0.*safetensors"):
        replfx.from_pretrained(tmp_path)


def test_dtypes_are_kept_or_as_asked_for(tmp_path: Path) -> None:
    model = transformed("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert {p.dtype for p in replfx.from_pretrained(tmp_path).parameters()} == {torch.bfloat16}
    asked = replfx.from_pretrained(tmp_path, dtype="float32", attn_implementation="eager")
    assert {p.dtype for p in asked.parameters()} == {torch.float32}
    assert asked.config._attn_implementation == "eager"
    assert asked.model.rotary_emb.inv_freq.dtype is torch.float32
    with pytest.raises(replfx.ReplfxError, match="dtype must be"):
        replfx.from_pretrained(tmp_path, dtype="float33")
    with pytest.raises(replfx.ReplfxError, match=r"does not know device_map=.*LlamaConfig has no such field"):
        replfx.from_pretrained(tmp_path, device_map="auto")


@pytest.mark.parametrize("plain", [replfx.materialize, lambda model: replfx.unroll(model) or model])
def test_at_full_depth_the_folder_is_a_plain_one(plain: Callable[[Any], Any], tmp_path: Path) -> None:
    model = transformed("gpt2")
    expected = logits(model, "gpt2")
    model.save_pretrained(tmp_path)
    model = plain(model)
    model.save_pretrained(tmp_path)  # over the other
    torch.testing.assert_close(logits(type(model).from_pretrained(tmp_path), "gpt2"), expected)
    with pytest.raises(replfx.PlanError, match="was saved untransformed"):
        replfx.from_pretrained(tmp_path)


def test_the_plan_is_that_of_the_blocks_which_are_replaced_still(tmp_path: Path) -> None:
    model = transformed("gpt2")
    replfx.unroll(model, blocks="transformer.h.1")
    model.save_pretrained(tmp_path)
    again = replfx.from_pretrained(tmp_path)
    assert replfx.report(again).replaced == ["transformer.h.3"]
    assert torch.equal(logits(again, "gpt2"), logits(model, "gpt2"))


def test_a_class_of_the_users_own_is_named(tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel

    class Mine(GPT2LMHeadModel):
        pass

    model = replfx.transform(Mine(language_model("gpt2").config), inputs_of("gpt2"))
    model.save_pretrained(tmp_path)
    with pytest.raises(replfx.ReplfxError, match="no class 'Mine': give from_pretrained your model_class="):
        replfx.from_pretrained(tmp_path)
    assert type(replfx.from_pretrained(tmp_path, model_class=Mine)) is Mine


def test_damaged_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(replfx.ReplfxError, match=r"there is no .*config\.json"):
        replfx.from_pretrained(tmp_path)
    model = transformed("gpt2")
    with pytest.raises(replfx.ReplfxError, match=r"call model\.push_to_hub"):
        model.save_pretrained(tmp_path, push_to_hub=True)
    model.save_pretrained(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    other = transformed("gpt2", select="transformer.h.2")
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(weights)
    with pytest.raises(replfx.StateDictError):
        replfx.from_pretrained(tmp_path)
    weights.write_bytes(b"{}")
    with pytest.raises(replfx.StateDictError, match="is damaged"):
        replfx.from_pretrained(tmp_path)
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "replfx_plan": {}}))
    with pytest.raises(replfx.PlanError):
        replfx.from_pretrained(tmp_path)


# ---- peft


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn", "c_proj"]])
def test_peft_takes_names_and_all_linear(targets: str | list[str], tmp_path: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    model = transformed("gpt2")
    expected = logits(model, "gpt2")
    model.save_pretrained(tmp_path / "base")
    options = {"r": 2, "target_modules": targets, "task_type": "CAUSAL_LM", "fan_in_fan_out": True}
    lora: Any = get_peft_model(model, LoraConfig(**options))
    torch.testing.assert_close(logits(lora, "gpt2"), expected)  # as every adapter starts
    lora(**inputs_of("gpt2"), labels=TOKENS).loss.backward()
    trained = [name for name, p in lora.named_parameters() if p.requires_grad and p.grad is not None]
    assert {name.split(".")[4] for name in trained} == {"0", "1", "2", "3", "4"}
    with torch.no_grad():
        for name, parameter in lora.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    lora.save_pretrained(tmp_path / "adapters")
    again = PeftModel.from_pretrained(replfx.from_pretrained(tmp_path / "base"), tmp_path / "adapters")
    assert not torch.allclose(logits(lora, "gpt2"), expected)
    torch.testing.assert_close(logits(again, "gpt2"), logits(lora, "gpt2"))
