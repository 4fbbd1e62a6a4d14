"""Trainers: two epochs of handwritten digits, saved after each, and the second one again from what the first left.

What goes on from a checkpoint has to end with the weights of what was never stopped, to the last bit: it starts as a
new process would, from a model with other weights and the plan that lies in the checkpoint.
"""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler, TensorDataset

import replfx
from tests.support.digits import digits as handwritten
from tests.support.models import ConvNet

pytestmark = pytest.mark.integrations

EPOCHS, BATCH, BATCHES = 2, 64, 16


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is downloaded, and nothing is told to anybody."""

    def refuse(self: socket.socket, address: object) -> None:
        raise AssertionError(f"a test wanted to reach {address}")

    for name in ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "DO_NOT_TRACK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(socket.socket, "connect", refuse)


# ---- what all of them train


def digits() -> TensorDataset:
    data = handwritten()
    return TensorDataset(data.train_images[: BATCH * BATCHES], data.train_labels[: BATCH * BATCHES])


class EpochOrder(Sampler[int]):
    """Another order in each epoch, the same one whenever that epoch is run; trainers call `set_epoch`."""

    def __init__(self, data: TensorDataset) -> None:
        self.length, self.epoch = len(data), 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(self.length, generator=generator).tolist())


def loader() -> DataLoader[Any]:
    data = digits()
    return DataLoader(data, BATCH, sampler=EpochOrder(data))


def cnn(seed: int) -> nn.Module:
    """Has batch statistics, which are to be saved and loaded too."""
    torch.manual_seed(seed)
    return ConvNet(5, (8,), channels=1, classes=10)


def optimizer_of(
    model: nn.Module, steps: int = 1
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """With state of its own, groups, and a rate that is halved every few steps: nothing of it may be forgotten."""
    optimizer = torch.optim.AdamW(replfx.parameter_groups(model, 0.05, learning_rate=5e-3))
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, steps, 0.5)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_resumed(start: dict[str, Tensor], whole: dict[str, Tensor], resumed: dict[str, Tensor]) -> None:
    coefficients = [name for name in whole if ".fusion." in name]
    assert coefficients
    assert not any(torch.equal(whole[name], start[name]) for name in coefficients)
    assert resumed.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def loss_on_digits(model: nn.Module, weights: dict[str, Tensor]) -> float:
    model.load_state_dict(weights)
    images, labels = digits().tensors
    with torch.no_grad():
        return F.cross_entropy(model.train()(images), labels).item()


# ---- Lightning


def test_lightning(tmp_path: Path) -> None:
    plan = replfx.plan(cnn(0))
    start = weights_of(replfx.apply(cnn(0), plan))
    whole = lightning_run(replfx.apply(cnn(0), plan), tmp_path / "whole", plan)
    (left,) = (tmp_path / "whole").glob("epoch=0*.ckpt")
    saved = torch.load(left, weights_only=True)
    assert saved["epoch"] == 0
    model = replfx.apply(cnn(99), replfx.Plan.from_json(saved["replfx_plan"]))
    resumed = lightning_run(model, tmp_path / "resumed", plan, left)
    assert_resumed(start, whole, resumed)
    assert loss_on_digits(model, whole) < 0.7 * loss_on_digits(model, start)


@pytest.mark.parametrize("at", [4, 0.5, 20])
def test_lightning_unrolls_and_goes_on(tmp_path: Path, at: float) -> None:
    """The checkpoint is of after the switch, of the very step, or of before."""
    plan = replfx.plan(cnn(0))
    whole = lightning_run(replfx.apply(cnn(0), plan), tmp_path / "whole", plan, at=at)
    (left,) = (tmp_path / "whole").glob("epoch=0*.ckpt")
    is_plain = not any(".replfx." in name for name in torch.load(left, weights_only=True)["state_dict"])
    assert is_plain == (at != 20)
    resumed = lightning_run(replfx.apply(cnn(99), plan), tmp_path / "resumed", plan, left, at=at)
    assert_ended_plain(cnn(0), whole, resumed)


def test_lightning_with_two_optimizers() -> None:
    """One for matrices and one for the rest, each of which gets its share of the new parameters at the right step."""
    import lightning

    from replfx.integrations.lightning import Unroll

    model, seen = replfx.transform(cnn(0)), []

    class Digits(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.automatic_optimization = model, False

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> None:
            images, labels = batch
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.model(images), labels))
            for optimizer in self.optimizers():
                optimizer.step()
            seen.append(sum(p.numel() for p in self.model.parameters()))

        def configure_optimizers(self) -> Any:
            matrices, rest = ([p for p in self.parameters() if (p.dim() > 1) is wanted] for wanted in (True, False))
            return torch.optim.SGD(matrices, 0.01), torch.optim.AdamW(rest, 1e-3)

    silent = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    callback, module = Unroll(6), Digits()
    options = {"max_epochs": 1, "accelerator": "cpu", "enable_checkpointing": False, "callbacks": [callback], **silent}
    trainer = lightning.Trainer(**options)
    trainer.fit(module, loader())
    assert [seen.index(count) for count in sorted(set(seen), key=seen.index)] == [0, 6]
    held = [{p for group in optimizer.param_groups for p in group["params"]} for optimizer in trainer.optimizers]
    assert held[0] == {p for p in model.parameters() if p.dim() > 1}
    assert held[1] == {p for p in model.parameters() if p.dim() <= 1}
    lightning.Trainer(**options).fit(module, loader())  # for longer
    averaging = lightning.pytorch.callbacks.StochasticWeightAveraging(0.1)
    with pytest.raises(replfx.PlanError, match="StochasticWeightAveraging averages parameters by their positions"):
        lightning.Trainer(**{**options, "callbacks": [Unroll(6), averaging]}).fit(module, loader())


def assert_ended_plain(plain: nn.Module, whole: dict[str, Tensor], resumed: dict[str, Tensor]) -> None:
    plain.load_state_dict(whole)
    for name, value in whole.items():
        assert torch.equal(value, resumed[name]), name


def lightning_run(
    model: nn.Module, folder: Path, plan: replfx.Plan, left: Path | None = None, at: float | None = None
) -> dict[str, Tensor]:
    import lightning
    from lightning.pytorch.callbacks import ModelCheckpoint

    from replfx.integrations.lightning import Unroll

    class Digits(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            images, labels = batch
            return F.cross_entropy(self.model(images), labels)

        def configure_optimizers(self) -> Any:
            optimizer, schedule = optimizer_of(self)
            return [optimizer], [schedule]

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["replfx_plan"] = plan.to_json()

    trainer = lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ModelCheckpoint(folder, save_top_k=-1), *([] if at is None else [Unroll(at)])],
    )
    trainer.fit(Digits(), loader(), ckpt_path=left)
    assert trainer.current_epoch == EPOCHS
    assert trainer.global_step == EPOCHS * BATCHES
    return weights_of(model)


# ---- transformers


class Pixels(Dataset[dict[str, Tensor]]):
    """Each digit as a sequence of its 64 pixels, whose seventeen shades are the words of a language model."""

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        self.shades, self.labels = torch.from_numpy(bunch.data).long(), torch.from_numpy(bunch.target)

    def __len__(self) -> int:
        return BATCH * BATCHES

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.shades[index], "labels": self.labels[index]}


class Pictures(Dataset[dict[str, Tensor]]):
    """Digits by the names of a vision model's arguments."""

    def __init__(self) -> None:
        self.data = digits()

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        image, label = self.data[index]
        return {"pixel_values": image, "labels": label}


SIZES = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 2, "intermediate_size": 64, "num_labels": 10}


def bert(seed: int) -> nn.Module:
    """With dropout, as it is by default: its random numbers have to go on as well."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(seed)
    return BertForSequenceClassification(BertConfig(vocab_size=17, max_position_embeddings=64, **SIZES))


def vit(seed: int) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(seed)
    config = ViTConfig(image_size=8, patch_size=2, num_channels=1, **SIZES)
    return ViTForImageClassification(config)


def test_transformers_trainer(tmp_path: Path) -> None:
    plan = replfx.plan(bert(0), {key: value[None] for key, value in Pixels()[0].items()})
    start = weights_of(replfx.apply(bert(0), plan))
    whole, losses = transformers_run(replfx.apply(bert(0), plan), Pixels(), tmp_path / "whole", plan)
    assert losses[-1] < losses[0]
    left = tmp_path / "whole" / f"checkpoint-{BATCHES}"
    model = replfx.apply(bert(99), replfx.Plan.from_json((left / "plan.json").read_text()))
    resumed, _ = transformers_run(model, Pixels(), tmp_path / "resumed", plan, left)
    assert_resumed(start, whole, resumed)


@pytest.mark.parametrize("at", [4, 0.5, 20])
def test_transformers_trainer_unrolls_and_goes_on(tmp_path: Path, at: float) -> None:
    plan = replfx.plan(bert(0), {key: value[None] for key, value in Pixels()[0].items()})
    whole, _ = transformers_run(replfx.apply(bert(0), plan), Pixels(), tmp_path / "whole", plan, at=at)
    left = tmp_path / "whole" / f"checkpoint-{BATCHES}"
    resumed, _ = transformers_run(replfx.apply(bert(99), plan), Pixels(), tmp_path / "resumed", plan, left, at=at)
    assert_ended_plain(bert(0), whole, resumed)


def test_transformers_trainer_that_makes_its_model_itself(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from replfx.integrations.transformers import Unroll

    plan = replfx.plan(bert(0), {key: value[None] for key, value in Pixels()[0].items()})
    arguments = TrainingArguments(str(tmp_path), max_steps=4, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = Trainer(
        model_init=lambda: replfx.apply(bert(0), plan),
        args=arguments,
        train_dataset=Pixels(),
        callbacks=[Unroll(unroll_at=2)],
    )
    trainer.train()
    assert trainer.model is not None
    assert trainer.model.state_dict().keys() == bert(0).state_dict().keys()
    assert trainer.optimizer is not None
    held = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    assert held == set(trainer.model.parameters())


def test_transformers_trainer_where_transformers_renames_weights(tmp_path: Path) -> None:
    """A transformed model is saved under the names that it has. Of a plain one the Trainer loads none (5.24)."""
    plan = replfx.plan(vit(0), {key: value[None] for key, value in Pictures()[0].items()})
    start = weights_of(replfx.apply(vit(0), plan))
    whole, _ = transformers_run(replfx.apply(vit(0), plan), Pictures(), tmp_path / "whole", plan)
    left = tmp_path / "whole" / f"checkpoint-{BATCHES}"
    resumed, _ = transformers_run(replfx.apply(vit(99), plan), Pictures(), tmp_path / "resumed", plan, left)
    assert_resumed(start, whole, resumed)
    last = replfx.from_pretrained(max((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: path.stat().st_mtime))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in last.state_dict().items())


def transformers_run(
    model: nn.Module,
    data: Dataset[dict[str, Tensor]],
    folder: Path,
    plan: replfx.Plan,
    left: Path | None = None,
    at: float | None = None,
) -> tuple[dict[str, Tensor], list[float]]:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from replfx.integrations.transformers import Unroll

    class SavePlan(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (folder / f"checkpoint-{state.global_step}" / "plan.json").write_text(plan.to_json())

    arguments = TrainingArguments(
        str(folder),
        num_train_epochs=EPOCHS,
        per_device_train_batch_size=BATCH,
        save_strategy="epoch",
        logging_steps=BATCHES,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    made = optimizer_of(model, BATCHES)  # its own groups would let the coefficients decay
    callbacks = [SavePlan(), *([] if at is None else [Unroll(at)])]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=callbacks, optimizers=made)
    trainer.train(resume_from_checkpoint=None if left is None else str(left))
    assert trainer.state.global_step == EPOCHS * BATCHES
    return weights_of(model), [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# ---- Accelerate


def test_accelerate(tmp_path: Path) -> None:
    plan = replfx.plan(cnn(0))
    start = weights_of(replfx.apply(cnn(0), plan))
    whole = accelerate_run(replfx.apply(cnn(0), plan), tmp_path, plan)
    left = tmp_path / "epoch-0"
    model = replfx.apply(cnn(99), replfx.Plan.from_json((left / "plan.json").read_text()))
    resumed = accelerate_run(model, tmp_path / "resumed", plan, left)
    assert_resumed(start, whole, resumed)
    assert loss_on_digits(model, whole) < 0.7 * loss_on_digits(model, start)


@pytest.mark.parametrize("at", [4, 16, 20])
def test_accelerate_unrolls_and_goes_on(tmp_path: Path, at: int) -> None:
    plan = replfx.plan(cnn(0))
    whole = accelerate_run(replfx.apply(cnn(0), plan), tmp_path, plan, at=at)
    resumed = accelerate_run(replfx.apply(cnn(99), plan), tmp_path / "resumed", plan, tmp_path / "epoch-0", at=at)
    assert_ended_plain(cnn(0), whole, resumed)


def accelerate_run(
    model: nn.Module, folder: Path, plan: replfx.Plan, left: Path | None = None, at: int | None = None
) -> dict[str, Tensor]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # as in a new process
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    prepared, optimizer, schedule, batches = accelerator.prepare(model, *optimizer_of(model), loader())
    unrolls = None if at is None else replfx.Schedule(prepared, optimizer, unroll_at=at, follow=True)
    if unrolls is not None:
        accelerator.register_for_checkpointing(unrolls)
    if left is not None:
        accelerator.load_state(str(left))
    for epoch in range(0 if left is None else 1, EPOCHS):
        batches.set_epoch(epoch)
        for images, labels in batches:
            optimizer.zero_grad()
            accelerator.backward(F.cross_entropy(prepared(images), labels))
            accelerator.clip_grad_norm_(prepared.parameters(), 1.0)
            optimizer.step()
            if unrolls is not None:
                unrolls.step()
        schedule.step()
        accelerator.save_state(str(folder / f"epoch-{epoch}"))
        (folder / f"epoch-{epoch}" / "plan.json").write_text(plan.to_json())
    return weights_of(accelerator.unwrap_model(prepared))
