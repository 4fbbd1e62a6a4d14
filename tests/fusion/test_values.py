"""Which weights the light operator takes for an attention's value and output maps, against maps written out."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import replfx
from replfx.operators.light import LightRecipe

WIDTH, TOKENS = 12, 5


class Root(nn.Module):
    """RMSNorm by another name for what is near zero, as in transformers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.variance_epsilon = nn.Parameter(torch.rand(width)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return (1 + self.scale) * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon)


class Grouped(nn.Module):
    """Grouped-query attention whose queries, keys and values are made by one layer, in one of several orders."""

    def __init__(self, groups: int, shared: int, dim: int, layout: str, columns: bool) -> None:
        super().__init__()
        self.groups, self.shared, self.dim, self.layout, self.columns = groups, shared, dim, layout, columns
        out = (shared + 2) * groups * dim
        self.root = Root(WIDTH)
        self.fused = nn.Parameter(torch.randn(*((WIDTH, out) if columns else (out, WIDTH))) / 4)
        self.back = nn.Parameter(torch.randn(WIDTH, groups * shared * dim) / 4)
        self.shift = nn.Parameter(torch.randn(out))

    def split(self, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, last dimension (heads or groups, dim)."""
        g, s, d = self.groups, self.shared, self.dim
        if self.layout == "parts":  # all queries, all keys, all values
            q, k, v = made.split((g * s * d, g * d, g * d), -1)
        elif self.layout == "values first":
            v, q, k = made.split((g * d, g * s * d, g * d), -1)
        else:  # each group's queries, its key and its value
            q, k, v = (part.flatten(-2) for part in made.unflatten(-1, (g, (s + 2) * d)).split((s * d, d, d), -1))
        return q.unflatten(-1, (g * s, d)), k.unflatten(-1, (g, d)), v.unflatten(-1, (g, d))

    def value_map(self) -> Tensor:
        """The map from normalised token to what `back` takes, written out."""
        rows = self.fused.T if self.columns else self.fused
        _, _, values = self.split(rows.detach().T)  # (d, groups, dim)
        return values.repeat_interleave(self.shared, 1).flatten(1).T

    def forward(self, x: Tensor) -> Tensor:
        h = self.root(x)
        made = h @ self.fused + self.shift if self.columns else F.linear(h, self.fused, self.shift)
        q, k, v = self.split(made)
        k, v = (part.repeat_interleave(self.shared, -2) for part in (k, v))
        heads = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(-2)
        return x + F.linear(mixed, self.back)


@settings(max_examples=10)
@given(
    groups=st.integers(1, 3),
    shared=st.integers(1, 3),
    dim=st.integers(1, 4),
    layout=st.sampled_from(("parts", "values first", "groups")),
    columns=st.booleans(),
)
def test_value_and_output_map(groups: int, shared: int, dim: int, layout: str, columns: bool) -> None:
    model = nn.Sequential(*(Grouped(groups, shared, dim, layout, columns) for _ in range(3))).double()
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    (replacement,) = replfx.plan(model, x, operator="light").replacements
    recipe = LightRecipe.read(replacement.operator.options)
    assert (recipe.maps, recipe.norm, recipe.norm_first) == (("fused", "back"), "root", True)
    fused = model[1].fused.detach()
    part = fused if recipe.rows is None else fused[recipe.rows[0] : recipe.rows[1]]
    assert torch.equal(recipe.matrix("fused", part), model[1].value_map())

    made = replfx.transform(model, x, operator={"name": "light", "initial_gain": 0.3}, fusion="scalar")
    value = (model[0].value_map() + model[2].value_map()) / 2
    back = (model[0].back + model[2].back) / 2
    h = model[0](x)
    expected = model[2](h + 0.3 * (model[1].root(h) @ value.T @ back.T))
    torch.testing.assert_close(made(x), expected)


class Normed(Grouped):
    """What the output map takes is normalised: no row of the first map is what it takes."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(F.linear(self.root(x), self.fused))
        heads = (part.transpose(1, 2) for part in (q, k, v))
        mixed = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(-2)
        return x + F.linear(F.layer_norm(mixed, mixed.shape[-1:]), self.back)


def test_values_that_cannot_be_told_are_refused() -> None:
    model = nn.Sequential(*(Normed(3, 1, 4, "parts", False) for _ in range(3)))
    with pytest.raises(replfx.NoChainError, match="which weights of `fused` make the values that `back` takes"):
        replfx.transform(model, torch.randn(2, TOKENS, WIDTH), operator="light")


SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 32}
GROUPED = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 32, "n_positions": 32}
OPT = {**SIZES, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 32}


def _heads(weight: Tensor, layout: tuple[int, ...], places: tuple[int, ...]) -> Tensor:
    """Of a fused weight, laid out as (groups, parts) heads of 8, the heads at `places` of each group."""
    return torch.cat([weight.view(*layout, 8, 32)[group, place] for group in range(layout[0]) for place in places])


@pytest.mark.parametrize(
    ("name", "options", "values", "norm"),
    [
        ("Llama", GROUPED, lambda b: _heads(b.self_attn.v_proj.weight, (2, 1), (0, 0)), "input_layernorm"),
        ("Qwen3", {**GROUPED, "head_dim": 8}, lambda b: _heads(b.self_attn.v_proj.weight, (2, 1), (0, 0)), None),
        ("Gemma2", {**GROUPED, "head_dim": 8}, lambda b: _heads(b.self_attn.v_proj.weight, (2, 1), (0, 0)), None),
        (
            "GPTNeoX",
            {**SIZES, "intermediate_size": 64},
            lambda b: _heads(b.attention.query_key_value.weight, (4, 3), (2,)),
            None,
        ),
        ("Phi", {**SIZES, "intermediate_size": 64}, lambda b: b.self_attn.v_proj.weight, None),
        (
            "Phi3",
            {**GROUPED, "pad_token_id": 0},
            lambda b: _heads(b.self_attn.qkv_proj.weight[48:], (2, 1), (0, 0)),
            None,
        ),
        (
            "Falcon",
            {**SIZES, "new_decoder_architecture": True, "num_kv_heads": 2},
            lambda b: _heads(b.self_attention.query_key_value.weight, (2, 4), (3, 3)),
            "ln_attn",
        ),
        ("GPT2", GPT2, lambda b: b.attn.c_attn.weight[:, 64:].T, "ln_1"),
        ("GPTBigCode", GPT2, lambda b: b.attn.c_attn.weight[40:].repeat(4, 1), "ln_1"),
        ("OPT", OPT, lambda b: b.self_attn.v_proj.weight, "self_attn_layer_norm"),
    ],
)
def test_decoders_of_transformers(
    name: str, options: dict[str, Any], values: Callable[[Any], Tensor], norm: str | None
) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{name}Config")(**options)
    model = getattr(transformers, f"{name}Model")(config)
    ids = {"input_ids": torch.randint(3, 32, (2, 7)), "use_cache": False}
    (replacement,) = replfx.plan(model, ids, operator="light").replacements
    recipe, block = LightRecipe.read(replacement.operator.options), model.get_submodule(replacement.path)
    weight = block.get_parameter(recipe.maps[0])
    part = weight if recipe.rows is None else weight[recipe.rows[0] : recipe.rows[1]]
    assert torch.equal(recipe.matrix(recipe.maps[0], part), values(block))
    assert (recipe.norm, recipe.norm_first) == (norm or "input_layernorm", True)
