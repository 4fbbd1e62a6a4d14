"""The mixer operator against blocks without their MLP, written out; what it fits, and what it does not."""

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import replfx
from replfx.operators import MixerOperator
from tests.support.models import Row
from tests.support.strategies import randomize

WIDTH, TOKENS = 8, 5


class Mixing(nn.Module):
    """A transformer block as it is taught; the others are variations of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.build()

    def build(self) -> None:
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        return self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))

    def mixed(self, x: Tensor) -> Tensor:
        """What is left of `forward` without the MLP."""
        return x + self.attend(x)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + self.mlp(self.norm2(x))


class Scaled(Mixing):
    """With LayerScale: a module's for one branch, the block's own parameter for the other, and dropout."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma = nn.Parameter(torch.rand(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.gamma

    def build(self) -> None:
        super().build()
        self.scale, self.gamma, self.drop = self.Scale(), nn.Parameter(torch.rand(WIDTH)), nn.Dropout(0.0)

    def mixed(self, x: Tensor) -> Tensor:
        return x + self.drop(self.scale(self.attend(x)))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.scale(self.attend(x)))
        return x + self.drop(self.gamma * self.mlp(self.norm2(x)))


class Gated(Mixing):
    """A gated MLP whose layers are the block's own."""

    def build(self) -> None:
        self.gate, self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Parallel(Mixing):
    """Both branches read one normalisation."""

    def build(self) -> None:
        super().build()
        del self.norm2

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attend(x) + self.mlp(self.norm1(x))


class First(Mixing):
    """The MLP comes first."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(self.norm2(x))
        return x + self.attend(x)


class Tokens(Mixing):
    """An MLP-Mixer's."""

    def build(self) -> None:
        super().build()
        del self.qkv
        self.tokens = nn.Linear(TOKENS, TOKENS)

    def attend(self, x: Tensor) -> Tensor:
        return self.proj(self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2))


class Inside(Mixing):
    """The sum is within a submodule, as in T5."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.dense = nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())
            self.out = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + F.dropout(self.out(self.dense(self.norm(x))), 0.0, self.training)

    def build(self) -> None:
        del self.norm2
        self.ff = self.Residual()

    def forward(self, x: Tensor) -> Tensor:
        return self.ff(x + self.attend(x))


class Last(Mixing):
    """Of two MLPs the last one mixes tokens, by layers that see each token alone in other blocks."""

    def build(self) -> None:
        super().build()
        del self.qkv, self.proj
        self.tokens = nn.Sequential(nn.Linear(TOKENS, 12), nn.GELU(), nn.Linear(12, TOKENS))

    def attend(self, x: Tensor) -> Tensor:
        return self.tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mlp(self.norm2(x))
        return x + self.attend(x)


class Columns(Mixing):
    """Its layers have an output's weights in a column, as GPT-2's."""

    class Layer(nn.Module):
        def __init__(self, inward: int, outward: int) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(inward, outward) / 4), nn.Parameter(torch.zeros(outward))

        def forward(self, x: Tensor) -> Tensor:
            return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)

    def build(self) -> None:
        self.qkv, self.proj = self.Layer(WIDTH, 3 * WIDTH), self.Layer(WIDTH, WIDTH)
        self.mlp = nn.Sequential(self.Layer(WIDTH, 16), nn.GELU(), self.Layer(16, WIDTH))


class Flat(Mixing):
    """Lays its tokens out as rows for the MLP and the sum, as OPT does."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        rows = x.reshape(-1, x.size(-1))
        return (rows + F.dropout(self.mlp(self.norm2(rows)), 0.0, self.training)).view(x.shape)


BLOCKS = (Mixing, Scaled, Gated, Parallel, First, Tokens, Inside, Last, Columns, Flat)


def stack(kind: type[nn.Module], depth: int = 5) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(kind() for _ in range(depth))).double()


def reference(model: nn.Sequential) -> nn.ModuleList:
    """Every second block with the mean of its neighbours' matrices, as plain PyTorch."""
    return nn.ModuleList(copy.deepcopy(list(model)))


def run_reference(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for position, block in enumerate(blocks):
        if position % 2 == 0:
            x = block(x)
            continue
        before, after = (dict(blocks[position + step].named_parameters()) for step in (-1, 1))
        theta = {n: (before[n] + after[n]) / 2 for n, p in block.named_parameters() if p.dim() > 1}
        call = _Mixed(block)
        x = torch.func.functional_call(call, {f"block.{name}": value for name, value in theta.items()}, x)
    return x


class _Mixed(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block.mixed(x)


@pytest.mark.parametrize("with_inputs", [True, False])
@pytest.mark.parametrize("kind", BLOCKS)
def test_it_is_the_block_without_its_mlp(kind: type[nn.Module], with_inputs: bool) -> None:
    model = stack(kind)
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    made = replfx.transform(model, x if with_inputs else None, operator="mixer", fusion="scalar")
    assert list(replfx.report(made).replaced) == ["1", "3"]
    wanted = reference(model)
    y, expected = made(x), run_reference(wanted, x)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    grads = dict(wanted.named_parameters())
    for name, parameter in made.named_parameters():
        if not parameter.requires_grad or "replfx" in name:
            continue
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, grads[name].grad)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters() if p.requires_grad)
    fewer = [name for name, p in made[1].named_parameters() if p.requires_grad and "replfx" not in name]
    assert {name.split(".")[0] for name in fewer} <= {"norm1", "qkv", "proj", "scale", "tokens"}


@pytest.mark.parametrize("kind", BLOCKS)
def test_it_goes_the_ways_that_other_operators_go(kind: type[nn.Module]) -> None:
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    made = replfx.transform(stack(kind), x, operator="mixer").eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter) / 8)
    y = made(x)
    plain = replfx.materialize(made)
    torch.testing.assert_close(plain(x), y)
    assert not any("replfx" in type(module).__module__ for module in plain.modules())
    again = replfx.apply(stack(kind), replfx.Plan.from_json(replfx.plan_of(made).to_json()), x).eval()
    again.load_state_dict(made.state_dict())
    for other in (again, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert torch.equal(other(x), y)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_dynamo")
def test_they_are_exported_and_compiled() -> None:
    """One of each way in which what is left runs; the others call their modules as Scaled does."""
    kinds = (Scaled, Parallel, Inside, Columns, Flat)
    model = nn.Sequential(*(stack(kind, 3) for kind in kinds))
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    made = replfx.transform(model, x, operator="mixer", select=[f"{i}.1" for i in range(len(kinds))]).eval()
    randomize(made, 1)
    y = made(x)
    torch.testing.assert_close(torch.export.export(made, (x,)).module()(x), y)
    compiled = torch.compile(made, backend=replfx.backend(inner="aot_eager"), fullgraph=True)
    torch.testing.assert_close(compiled(x), y)


@pytest.mark.parametrize("kind", BLOCKS)
def test_it_is_unrolled_into_a_block_whose_mlp_gives_nothing(kind: type[nn.Module]) -> None:
    model = stack(kind)
    x = torch.randn(2, TOKENS, WIDTH, dtype=torch.float64)
    made = replfx.transform(model, x, operator="mixer").eval()
    y = made(x)
    optimizer = torch.optim.AdamW(made.parameters())
    full = replfx.unroll(made, optimizer).train()
    assert [type(block) for block in full] == [kind] * 5
    assert full.state_dict().keys() == model.state_dict().keys()
    torch.testing.assert_close(full(x), y)
    full(x).sum().backward()
    held = {p for group in optimizer.param_groups for p in group["params"]}
    assert held == set(full.parameters())
    optimizer.step()
    assert not torch.allclose(full(x), y)


class Attentive(Mixing):
    """Two branches that mix tokens."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + self.attend(x)


class Shaped(Mixing):
    """The block itself reshapes what its MLP gives."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return x + self.mlp(self.norm2(x).flatten(0, 1)).unflatten(0, x.shape[:2])


class Alone(Mixing):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm2(x))


class After(Mixing):
    """Normalised after the sum."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attend(x))
        return self.norm2(x + self.mlp(x))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Attentive, "its branch at `[_a-z0-9]*` mixes tokens; its branch at `[_a-z0-9]*` mixes tokens"),
        (Shaped, "its MLP is not made of modules alone"),
        (Alone, "it has one branch alone"),
        (After, "it is not residual"),
    ],
)
def test_blocks_that_it_does_not_fit_say_why(kind: type[nn.Module], reason: str) -> None:
    model = stack(kind)
    with pytest.raises(replfx.FusionError, match=f"operator 'mixer' does not fit it: .*{reason}"):
        replfx.transform(
            model, torch.randn(2, TOKENS, WIDTH, dtype=torch.float64), operator="mixer", select="1", fusion="scalar"
        )


def test_options_that_are_malformed_are_refused() -> None:
    model = stack(Mixing)
    made = replfx.transform(model, operator="mixer")
    assert isinstance(made[1].replfx.operator, MixerOperator)
    text = replfx.plan_of(made).to_json()
    for wrong in (text.replace('"mlp"', '"mpl"'), text.replace('"dropped"', '"drooped"')):
        assert wrong != text
        with pytest.raises(replfx.ReplfxError):
            replfx.apply(stack(Mixing), replfx.Plan.from_json(wrong))


def _timm(name: str, **options: object) -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.create_model(name, num_classes=10, **options)


def _mlp_mixer() -> nn.Module:
    module = pytest.importorskip("timm.models.mlp_mixer")
    return module.MlpMixer(num_classes=10, img_size=64, patch_size=32, num_blocks=5, embed_dim=24)


def _torchvision_vit() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return models.VisionTransformer(32, 16, num_layers=5, num_heads=2, hidden_dim=24, mlp_dim=48)


def _torchvision_swin() -> nn.Module:
    models = pytest.importorskip("torchvision").models
    return models.SwinTransformer([4, 4], 12, [2, 2, 6, 2], [1, 2, 2, 2], window_size=[7, 7])


@pytest.mark.parametrize(
    ("build", "side", "count"),
    [
        (lambda: _timm("vit_tiny_patch16_224", img_size=32, drop_path_rate=0.1, depth=5), 32, 2),
        (lambda: _timm("eva02_tiny_patch14_224", img_size=28, depth=5), 28, 2),  # gated, with rotary positions
        (lambda: _timm("beit_base_patch16_224", img_size=32, embed_dim=24, num_heads=2, depth=5), 32, 2),  # LayerScale
        (_mlp_mixer, 64, 2),
        (_torchvision_vit, 32, 2),
        (_torchvision_swin, 64, 5),  # one drop-path for both branches
    ],
    ids=["vit", "eva02", "beit", "mlp-mixer", "torchvision-vit", "swin"],
)
def test_models_out_of_libraries(build: Callable[[], nn.Module], side: int, count: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, side, side)
    made = replfx.transform(build().train(), x, operator="mixer")
    assert len(replfx.report(made).replaced) == count
    made(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in made.parameters() if p.requires_grad)
    made.eval()
    with torch.no_grad():
        y = made(x)
        torch.testing.assert_close(replfx.materialize(made)(x), y, rtol=0, atol=0)
        torch.testing.assert_close(replfx.unroll(made).eval()(x), y, rtol=0, atol=0)  # a sum with zero is exact


# ---- ways in which other people write their MLPs


class InPlace(Mixing):
    """Falcon's: the other branch is added into what the MLP gives."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.mlp(self.norm2(x))
        h += self.attend(x)
        return h + x


class Scored(nn.Module):
    """An MLP that gives its scores too, as mixtures of experts do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, None]:
        y = self.layers(x)
        return y, y.softmax(-1), None


class Unpacked(Mixing):
    def build(self) -> None:
        self.mlp = Scored()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        y, _, nothing = self.mlp(self.norm2(x))
        assert nothing is None
        return x + y


class Adding(nn.Module):
    """BLOOM's MLP: it gets the activation too, and does the sum itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, h: Tensor, x: Tensor) -> Tensor:
        return x + F.dropout(self.last(F.gelu(self.first(h))), 0.0, self.training)


class Handed(Mixing):
    def build(self) -> None:
        self.mlp = Adding()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attend(x)
        return self.mlp(self.norm2(x), x)


class Sorted(nn.Module):
    """Tokens sorted by expert, sent through matrices that know no double precision, and put back in order."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        order = rows[:, 0].detach().argsort()
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        return self.down(_single(self.up(rows[order])))[back].view_as(x)


def _single(x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        raise RuntimeError("Expected mat_a to be Float32, BFloat16 or Float16 matrix, got Double")
    return F.relu(x)


torch.fx.wrap("_single")


class Expert(Mixing):
    def build(self) -> None:
        self.mlp = Sorted()


@pytest.mark.parametrize("kind", [InPlace, Unpacked, Handed, Expert])
def test_an_mlp_is_left_out_however_it_is_written(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, TOKENS, WIDTH)
    model = nn.Sequential(*(kind() for _ in range(3)))
    made = replfx.transform(model, x, operator="mixer", fusion="scalar")
    assert not any("mlp" in name for name, _ in made[1].named_parameters())
    made(x).square().sum().backward()
    with torch.no_grad():
        h = model[0](x)
        h = h + made[1].attend(h)  # the block's own attention, which reads synthesised weights
        expected = model[2](h)
        torch.testing.assert_close(made(x), expected)
        torch.testing.assert_close(replfx.materialize(made)(x), expected)


def test_an_encoder_layer_of_torch_takes_the_way_without_its_fused_operator() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.TransformerEncoder(layer, 5, enable_nested_tensor=False)
    x = torch.randn(2, TOKENS, WIDTH)
    made = replfx.transform(model, x, operator="mixer")
    assert list(replfx.report(made).replaced) == ["layers.1", "layers.3"]
    expected = made(x)
    for one in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made)), replfx.materialize(made)):
        with torch.no_grad():
            torch.testing.assert_close(one.eval()(x), expected)


class Masked(nn.Module):
    """An MLP, and then what mixes tokens, of which a mask of whole numbers lets none pass where it is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(8), nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))
        self.mixing = nn.Linear(6, 6)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.mlp(self.norm1(x))
        shown = self.norm2(x) * mask.unsqueeze(-1)
        return x + self.mixing(shown.transpose(1, 2)).transpose(1, 2) * mask.unsqueeze(-1)


class MaskedRow(Row):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return x


def test_a_mask_of_whole_numbers_does_not_hide_what_mixes_tokens() -> None:
    x, mask = torch.randn(2, 6, 8), torch.ones(2, 6, dtype=torch.long)
    plan = replfx.plan(MaskedRow(*(Masked() for _ in range(5))), (x, mask), operator="mixer")
    assert [r.operator.options["dropped"] for r in plan.replacements] == [["norm1", "mlp"]] * 2
