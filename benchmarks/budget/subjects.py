"""The models that budgets are met with: random weights, and a batch each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.compiling.subjects import SUBJECTS as COMPILE
from benchmarks.models import SUBJECTS as STEP
from replfx.tracing import ExampleInputs

Made = tuple[nn.Module, ExampleInputs]


def _of_step(name: str, small: str, kind: str, quick: bool) -> Made:
    """One of the step benchmark's, or the small form that the compile benchmark has of its kind."""
    if quick:
        return COMPILE[small].quick(), COMPILE[small].batch(kind, 2, True)[0]
    subject = STEP[name]
    return subject.build(kind), subject.batch(kind, 4 if kind == "cpu" else subject.sizes[kind])[0]


def _llama(kind: str, quick: bool) -> Made:
    """Grouped queries, a gated MLP, RMSNorm, rotary positions; a cache of keys and values that each block fills."""
    from transformers import LlamaConfig, LlamaForCausalLM

    width = 32 if quick else 320 if kind == "cpu" else 1024
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=5 if quick else 10,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    ids = torch.randint(512, (2 if quick else 4, 16 if quick else 128))
    inputs: dict[str, Tensor] = {"input_ids": ids, "labels": ids}
    return LlamaForCausalLM(config), inputs


def _bert(kind: str, quick: bool) -> Made:
    """Post-norm blocks, which take a mask."""
    from transformers import BertConfig, BertModel

    width = 32 if quick else 256 if kind == "cpu" else 768
    config = BertConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=5 if quick else 10,
        num_attention_heads=4,
    )
    ids = torch.randint(512, (2 if quick else 4, 16 if quick else 128))
    return BertModel(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


SUBJECTS: Mapping[str, Callable[[str, bool], Made]] = {
    "vit_s": partial(_of_step, "vit_s", "vit_b"),
    "gpt": partial(_of_step, "gpt", "gpt2"),
    "llama": _llama,
    "bert": _bert,
    "resnet50": partial(_of_step, "resnet50", "resnet50"),
    "convnext_t": partial(_of_step, "convnext_t", "convnext_t"),
}
"""Name → (kind of device, whether a small one will do) → the model and its inputs, on the CPU."""
