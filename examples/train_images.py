"""Train an image classifier of timm's, some of its blocks replaced at first, in Accelerate's loop.

    python examples/train_images.py --data-root DIR --operator identity --unroll-at 0.4 --start copies
    accelerate launch examples/train_images.py --data-root DIR --model resnet50 --operator light --epochs 90

DIR has train/CLASS/*.png and val/CLASS/*.png (or .jpg, …). The folder of --output gets a checkpoint an epoch, a log for
TensorBoard, and at the end `model.safetensors`: weights of timm's own model, with nothing of replfx in them. Started
again with the same command, a run goes on from its newest checkpoint. Needs `pip install timm accelerate tensorboard`.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, set_seed
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

import replfx


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="a name of timm's")
    parser.add_argument("--pretrained", action="store_true", help="start from timm's weights, and calibrate")
    parser.add_argument("--image-size", type=int, help="default: the model's own")
    parser.add_argument("--no-replace", action="store_true", help="train the model as it is")
    parser.add_argument("--every", type=int, default=2, help="replace every k-th block of each chain")
    parser.add_argument("--operator", default="auto", help="block, mixer, light or identity")
    parser.add_argument("--unroll-at", type=float, metavar="SHARE", help="at full depth after this share of the steps")
    parser.add_argument("--start", default="outputs", choices=("outputs", "copies"), help="of the unrolled blocks")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=64, help="images a step and process")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--workers", type=int, default=4, help="processes that read images")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), default="no")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("run"))
    return parser.parse_args(argv)


def model_and_loaders(args: argparse.Namespace) -> tuple[nn.Module, DataLoader[Any], DataLoader[Any]]:
    """Make timm's model, and the images as it wants them."""
    folders = [args.data_root / name for name in ("train", "val")]
    known = timm.get_pretrained_cfg(args.model)
    fixed = known is not None and known.fixed_input_size and args.image_size is not None  # ViTs are made for one size
    options = {"img_size": args.image_size} if fixed else {}
    classes = sum(path.is_dir() for path in folders[0].iterdir())
    model = timm.create_model(args.model, pretrained=args.pretrained, num_classes=classes, **options)
    config = resolve_model_data_config(model, {"img_size": args.image_size})
    transforms = [create_transform(**config, is_training=True), create_transform(**config)]
    train, val = (ImageFolder(folder, transform) for folder, transform in zip(folders, transforms, strict=True))
    loaders = [
        DataLoader(train, args.batch_size, shuffle=True, drop_last=True, num_workers=args.workers),
        DataLoader(val, args.batch_size, num_workers=args.workers),
    ]
    return model, loaders[0], loaders[1]


def train(args: argparse.Namespace) -> float:
    """Train to the end; gives the share of validation images that are classified right."""
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        log_with="tensorboard",
        project_dir=args.output,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),  # an epoch's order is the seed's
    )
    accelerator.init_trackers("log", {k: str(v) for k, v in vars(args).items()})
    set_seed(args.seed)
    model, loader, val_loader = model_and_loaders(args)
    if not args.no_replace:
        images = next(iter(val_loader))[0][:2]
        calibrate = loader if args.pretrained else None
        model = replfx.transform(model, images, every=args.every, operator=args.operator, calibrate=calibrate)
        accelerator.print(replfx.report(model))
    replfx.check_ranks(model)  # that all processes replaced the same blocks
    optimizer = torch.optim.AdamW(replfx.parameter_groups(model, 0.05), args.learning_rate)
    model, optimizer, loader, val_loader = accelerator.prepare(model, optimizer, loader, val_loader)
    steps = args.epochs * len(loader)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=steps, pct_start=0.05)
    accelerator.register_for_checkpointing(rates)
    schedule = None
    if (at := args.unroll_at) is not None and not args.no_replace:
        schedule = replfx.Schedule(model, optimizer, unroll_at=at, total_steps=steps, start=args.start, follow=True)
        accelerator.register_for_checkpointing(schedule)

    done = sorted(args.output.glob("epoch-*"))
    if done:  # `follow=True`: if the checkpoint has full depth, loading it unrolls the model
        accelerator.load_state(str(done[-1]))
    for epoch in range(len(done), args.epochs):
        model.train()
        loader.set_epoch(epoch)
        for step, (pictures, labels) in enumerate(loader, epoch * len(loader) + 1):
            loss = F.cross_entropy(model(pictures), labels)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
            if schedule is not None and (unrolled := schedule.step()):  # after the optimizer's step
                accelerator.print(f"step {step}: {len(unrolled)} blocks are at full depth")
            accelerator.log({"loss": loss.item(), "learning rate": rates.get_last_lr()[0]}, step)
        correct = validate(accelerator, model, val_loader)
        accelerator.log({"validation accuracy": correct}, (epoch + 1) * len(loader))
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}, {correct:.1%} of the validation images right")
        save(accelerator, args.output / f"epoch-{epoch + 1:04}")

    plain = accelerator.unwrap_model(model)
    if not args.no_replace and (schedule is None or not schedule.is_done):
        plain = replfx.materialize(plain)
    accelerator.save(plain.state_dict(), args.output / "model.safetensors", safe_serialization=True)
    accelerator.end_training()
    return validate(accelerator, model, val_loader)


@torch.no_grad()
def validate(accelerator: Accelerator, model: nn.Module, loader: DataLoader[Any]) -> float:
    """Share of the images that are classified right, over all processes."""
    model.eval()
    right = [accelerator.gather_for_metrics(model(images).argmax(1) == labels) for images, labels in loader]
    return torch.cat(right).float().mean().item()


def save(accelerator: Accelerator, folder: Path) -> None:
    """Write a checkpoint beside and then rename it: what has its name is whole, whenever the run is killed."""
    beside = folder.with_name(f".{folder.name}.part")
    if accelerator.is_main_process:
        shutil.rmtree(beside, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(beside))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        beside.rename(folder)


if __name__ == "__main__":
    train(parse(None))
