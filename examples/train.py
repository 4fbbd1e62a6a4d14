"""Train an image classifier some of whose blocks are replaced, on one process or on many.

    python examples/train.py --data fake --model vit_tiny_patch16_224 --steps 100
    python examples/train.py --data-root DIR --model resnet50 --no-replace
    torchrun --nproc-per-node=2 examples/train.py --data-root DIR --model vit_base_patch16_224 \
        --every 2 --operator light --amp --compile --fsdp --output runs/light

The model is timm's or torchvision's of that name, the images are DIR/train/CLASS/*.png (or .jpg, …). `--output` gets
`log.csv`, one line a step, and the two newest checkpoints. Killed at any moment and started again with the same
command, the run goes on from the newest checkpoint, with the losses that it would have had without the interruption.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import random
import shutil
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, models, transforms

import replfx

MAY_CHANGE = ("data_root", "output", "save_every", "workers")  # between a run and its resumption: they change no loss
AGAIN = "Make room and start the same command again: it goes on from the newest checkpoint"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("folder", "fake"), default="folder", help="fake: noise, to try it out")
    parser.add_argument("--data-root", type=Path, default=Path("data"), help="folder with train/CLASS/*.png")
    parser.add_argument("--model", required=True, help="a name of timm's or torchvision's")
    parser.add_argument("--model-options", type=json.loads, default={}, help='as JSON: {"drop_path_rate": 0.1}')
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--no-replace", action="store_true", help="train the model as it is")
    parser.add_argument("--every", type=int, default=2, help="replace every k-th block of each chain")
    parser.add_argument("--operator", default="auto", help="what replaces a block: auto, block, light or identity")
    parser.add_argument(
        "--fusion", default="auto", help="how neighbours are fused: auto, scalar, scalar_layer, channel"
    )
    parser.add_argument(
        "--unroll-at", type=number, metavar="N", help="back to full depth after this share of the steps, or so many"
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=64, help="images a step and process")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=4, help="processes that read images, for each that trains")
    parser.add_argument("--fsdp", action="store_true", help="shard parameters over the processes, instead of DDP")
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile with replfx's backend")
    parser.add_argument("--output", type=Path, default=Path("run"), help="on a disk that all processes share")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    return parser.parse_args(argv)


def number(text: str) -> int | float:
    """A whole number, or a share."""
    return int(text) if text.isdecimal() else float(text)


# ---- data: a batch is a function of (seed, step, rank), so that a resumed run sees what it would have seen


def seed_of(*parts: object) -> int:
    """One seed from several values; the same in every process."""
    return random.Random("/".join(map(str, parts))).getrandbits(63)


@lru_cache(maxsize=2)  # a batch may lie in two epochs
def order_of(count: int, seed: int) -> Tensor:
    """The order of the images in one epoch."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


class Batches(Dataset[tuple[Tensor, Tensor]]):
    """What this rank learns from: item `step` is its batch at that step."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.seed, self.size = args.seed, args.batch_size
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        steps = [transforms.ToTensor(), transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]
        if args.data == "fake":
            shape = (3, args.image_size, args.image_size)
            self.images = datasets.FakeData(1024, shape, num_classes=10, transform=transforms.Compose(steps))
            self.classes = 10
            return
        if not (folder := args.data_root / "train").is_dir():
            raise replfx.ReplfxError(
                f"{folder} is no folder: --data-root has train/CLASS/*.png, --data fake needs none"
            )
        steps = [transforms.RandomResizedCrop(args.image_size), transforms.RandomHorizontalFlip(), *steps]
        self.images = datasets.ImageFolder(folder, transforms.Compose(steps))
        self.classes = len(self.images.classes)

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor]:
        first = (step * self.world_size + self.rank) * self.size
        with torch.random.fork_rng(devices=[]):  # without workers the augmentation would draw from the model's
            torch.default_generator.manual_seed(seed_of(self.seed, "images", step, self.rank))
            chosen = [self.images[self.at(position)] for position in range(first, first + self.size)]
        return torch.stack([image for image, _ in chosen]), torch.tensor([label for _, label in chosen])

    def at(self, position: int) -> int:
        """Which image is at a position of the endless sequence of epochs."""
        epoch, index = divmod(position, len(self.images))
        return int(order_of(len(self.images), seed_of(self.seed, "epoch", epoch))[index])


# ---- model


def build(args: argparse.Namespace, classes: int) -> tuple[nn.Module, list[str], str | None]:
    """Build the model; also gives the blocks that FSDP shards one by one, and the plan by which some were replaced."""
    import timm

    torch.manual_seed(args.seed)  # all ranks start from the same weights
    if timm.is_model(args.model):
        model: nn.Module = timm.create_model(args.model, num_classes=classes, **args.model_options)
    elif args.model in models.list_models():
        model = models.get_model(args.model, weights=None, num_classes=classes, **args.model_options)
    else:
        raise replfx.ReplfxError(f"neither timm nor torchvision has a model {args.model!r}: see timm.list_models()")
    example, modules = torch.zeros(2, 3, args.image_size, args.image_size), dict(model.named_modules())
    chains = replfx.inspect(model, example).chains if args.fsdp else []
    blocks = [path for chain in chains for path in chain if path in modules]
    if args.no_replace:
        return model, blocks, None
    plan = replfx.plan(model, example, every=args.every, operator=args.operator, fusion=args.fusion)
    return replfx.apply(model, plan, example), blocks, plan.to_json()


def distribute(args: argparse.Namespace, model: nn.Module, blocks: list[str], device: torch.device) -> nn.Module:
    """Compile the model and spread it over the processes; what comes back is to be called."""
    model.to(device).train()
    if args.fsdp:
        for path in blocks:
            fully_shard(model.get_submodule(path))
        fully_shard(model)
    if args.compile:
        model.compile(backend=replfx.backend())  # "replfx" is its name, known once replfx is installed
    if args.fsdp or dist.get_world_size() == 1:
        return model
    return DistributedDataParallel(model, device_ids=None if device.type == "cpu" else [device])


# ---- what has to be the same in all ranks, and in a run and its checkpoint


def check_same(one: dict[str, Any], other: dict[str, Any], where: str, advice: str) -> None:
    """Refuse what would train something else."""
    for name, value in one.items():
        if (found := other.get(name)) != value:
            if name == "plan":
                found, value = described(found), described(value)
            raise replfx.ReplfxError(f"{where} has another {name}: {found}, not {value}. {advice}")


def described(plan: str | None) -> str:
    """A plan in one line."""
    made = replfx.Plan.from_json(plan).replacements if plan else ()
    return ", ".join(f"{r.path} by {r.operator.name} ({r.fusion.name})" for r in made) or "nothing replaced"


def on_rank_0(act: Callable[[], object]) -> None:
    """Let rank 0 act. Where that fails all ranks raise, so that none waits for one that gave up."""
    failed: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            act()
        except (OSError, replfx.ReplfxError) as error:
            failed = [str(error)]
    dist.broadcast_object_list(failed)
    if failed[0] is not None:
        raise replfx.ReplfxError(failed[0])


def prepare(folder: Path) -> None:
    """Make sure that this run alone writes to the folder, and remove what killed ones left half-written."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR)  # held until the process ends, however it ends
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise replfx.ReplfxError(
            f"another run writes to {folder}: wait for its end, or give another --output"
        ) from None
    for part in folder.glob(".step-*.part"):
        shutil.rmtree(part)


# ---- checkpoints: written beside and then renamed, so that a folder `step-…` was whole when it got its name


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints, oldest first."""
    return sorted(folder.glob("step-*"))


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All tensors of a checkpoint. Each rank has random numbers of its own."""
    weights, moments = get_state_dict(model, optimizer)
    generators = {f"cpu {dist.get_rank()}": torch.get_rng_state()}
    if torch.cuda.is_available():
        generators[f"cuda {dist.get_rank()}"] = torch.cuda.get_rng_state()
    return {"model": weights, "optimizer": moments, "random": generators}


def save(folder: Path, state: dict[str, Any], about: dict[str, Any]) -> None:
    """Write a checkpoint of all ranks; only the two newest are kept."""
    final = folder / f"step-{about['step']:09}"
    beside = folder / f".{final.name}.part"

    def finish() -> None:
        sync(folder / "log.csv")
        logged, sizes = (folder / "log.csv").stat().st_size, {p.name: p.stat().st_size for p in beside.iterdir()}
        (beside / "run.json").write_text(json.dumps({**about, "logged": logged, "files": sizes}, indent=2))
        sync(beside / "run.json")
        sync(beside)
        beside.rename(final)
        sync(folder)
        for old in checkpoints_in(folder)[:-2]:
            shutil.rmtree(old.rename(folder / f".{old.name}.part"))

    try:
        state_dict_saver.save(state, checkpoint_id=beside)
        on_rank_0(finish)
    except (CheckpointException, replfx.ReplfxError) as error:
        on_rank_0(lambda: shutil.rmtree(beside, ignore_errors=True))
        whole = ", ".join(path.name for path in checkpoints_in(folder)) or "none yet"
        raise replfx.ReplfxError(
            f"{final} could not be written, with {shutil.disk_usage(folder).free / 2**30:.1f} GiB left there: "
            f"{cause_of(error)}. Whole checkpoints: {whole}. {AGAIN}"
        ) from error


def read(path: Path) -> dict[str, Any]:
    """What a checkpoint says about itself, if all its files are there."""
    try:
        about: dict[str, Any] = json.loads((path / "run.json").read_text())
        for name, size in about["files"].items():
            if (found := (path / name).stat().st_size) != size:
                raise ValueError(f"{name} has {found} bytes, not {size}")
    except (OSError, ValueError, KeyError) as error:
        older = [other.name for other in checkpoints_in(path.parent) if other < path]
        raise replfx.ReplfxError(
            f"the checkpoint {path} is damaged: {error}. Put the file back; or move the folder away, and the run "
            f"{f'goes on from {older[-1]}' if older else 'begins anew'}"
        ) from error
    return about


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Load the tensors of a checkpoint."""
    state = state_of(model, optimizer)
    try:
        state_dict_loader.load(state, checkpoint_id=path)
    except CheckpointException as error:
        raise replfx.ReplfxError(f"the checkpoint {path} cannot be read: {cause_of(error)}") from error
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    torch.set_rng_state(state["random"][f"cpu {dist.get_rank()}"])
    if torch.cuda.is_available():
        torch.cuda.set_rng_state(state["random"][f"cuda {dist.get_rank()}"])


def cause_of(error: BaseException) -> str:
    """What went wrong, and if that was in a collective in which ranks, without a traceback."""
    if isinstance(error, CheckpointException):
        return "; ".join(f"rank {rank}: {cause}" for rank, (cause, _) in error.failures.items())
    return str(error)


def sync(path: Path) -> None:
    """Have a file, or a folder's names, on the disk and not only on the way there."""
    opened = os.open(path, os.O_RDONLY)
    os.fsync(opened)
    os.close(opened)


# ---- training


def train(args: argparse.Namespace, device: torch.device) -> None:
    """Train from the newest checkpoint, or from the beginning, to the end."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    on_rank_0(lambda: prepare(args.output))
    batches = Batches(args)
    model, blocks, plan = build(args, batches.classes)
    replfx.check_ranks(model)
    identity = {"replfx": replfx.__version__, "world_size": world_size, "plan": plan, "images": len(batches.images)}
    identity |= {name: value for name, value in vars(args).items() if name not in MAY_CHANGE}
    newest = checkpoints_in(args.output)[-1:]
    all_ranks: list[Any] = [None] * world_size
    dist.all_gather_object(all_ranks, {**identity, "newest checkpoint": str(newest)})
    for other, its in enumerate(all_ranks):  # unlike models would mix up their tensors, or wait for good
        advice = "Start all ranks with one command, one version of replfx and an --output that they share"
        check_same(all_ranks[0], its, f"rank {other}, beside rank 0,", advice)
    step = 0
    about: dict[str, Any] = {"logged": 0}
    if newest:
        about = read(newest[0])
        advice = "Start it as it was started, or give another --output to begin anew"
        check_same(identity, about["identity"], f"the checkpoint {newest[0]}", advice)
    log = args.output / "log.csv"
    on_rank_0(lambda: cut(log, args, about["logged"]))
    network = distribute(args, model, blocks, device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor_of(step, args.steps))
    unrolls = None
    if args.unroll_at is not None and plan is not None:
        unrolls = replfx.Schedule(network, optimizer, unroll_at=args.unroll_at, total_steps=args.steps)
    torch.manual_seed(seed_of(args.seed, "rank", rank))  # dropouts differ between ranks
    if newest:
        if unrolls is not None:
            unrolls.load_state_dict(about["unrolls"])  # first: it says what the model and the optimizer hold
        load(newest[0], model, optimizer)
        schedule.load_state_dict(about["schedule"])
        step = about["step"]
    # Its own generator: the loader draws from it when it starts, which a resumed run does once more.
    loader = DataLoader(
        batches, None, sampler=range(step, args.steps), num_workers=args.workers, generator=torch.Generator()
    )
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=rank > 0) as progress:
        bar = progress.add_task(args.model, total=args.steps, completed=step)
        before = time.perf_counter()
        for images, labels in loader:
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                loss = F.cross_entropy(network(images.to(device)), labels.to(device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            [rate] = schedule.get_last_lr()
            schedule.step()
            step += 1
            if unrolls is not None:
                unrolls.step()
            dist.all_reduce(mean := loss.detach() / world_size)
            value, seconds, before = mean.item(), time.perf_counter() - before, time.perf_counter()
            if not math.isfinite(value):
                raise replfx.ReplfxError(f"the loss of step {step} is {value}; a lower --learning-rate may help")
            if rank == 0:
                write(log, f"{step},{value!r},{rate!r},{len(images) * world_size / seconds:.1f}")
            progress.update(bar, completed=step, description=f"loss {value:.4f}")
            if step % args.save_every == 0 or step == args.steps:
                about = {"step": step, "schedule": schedule.state_dict(), "identity": identity}
                about["unrolls"] = None if unrolls is None else unrolls.state_dict()
                save(args.output, state_of(model, optimizer), about)


def factor_of(step: int, steps: int) -> float:
    """Of the learning rate: it rises for a twentieth of the steps, then falls along a cosine."""
    rise = max(1, steps // 20)
    return min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * max(0, step - rise) / max(1, steps - rise)))


def cut(log: Path, args: argparse.Namespace, logged: int) -> None:
    """Bring the log back to the checkpoint: what was logged after it is trained once more."""
    size = log.stat().st_size if log.exists() else 0
    if size < logged:
        raise replfx.ReplfxError(f"{log} has {size} bytes, and had {logged} at the newest checkpoint: put it back")
    if size and not logged and len(log.read_text().splitlines()) > args.save_every + 1:
        raise replfx.ReplfxError(f"{log} is of a run whose checkpoints are gone: put them back, or move it away")
    if size:
        os.truncate(log, logged)
    if not logged:
        write(log, "step,loss,learning_rate,images_per_second")


def write(log: Path, line: str) -> None:
    """Add a line to the log. It is closed each time, so that the line outlives a kill."""
    try:
        with log.open("a") as file:
            print(line, file=file)
    except OSError as error:
        raise replfx.ReplfxError(f"{log} could not be written: {error}. {AGAIN}") from error


def main(argv: list[str] | None = None) -> None:
    """Join the other processes, if there are any, and train."""
    args = parse(argv)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else "cpu"
    if "RANK" in os.environ:  # started by torchrun
        dist.init_process_group()
    else:
        dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)  # type: ignore[attr-defined]
    try:
        train(args, torch.device(device))
    except (replfx.ReplfxError, OSError) as error:
        raise SystemExit(f"rank {dist.get_rank()}: {error}") from error
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
