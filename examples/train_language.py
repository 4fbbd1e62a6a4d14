"""Train a small language model on the bytes of a text, some of its blocks replaced at first: transformers' Trainer.

    python examples/train_language.py --text wikitext.txt --operator identity --unroll-at 0.4 --start copies
    torchrun --nproc-per-node=2 examples/train_language.py --text wikitext.txt --model llama --no-replace

The last tenth of the text is for validation. The folder of --output gets checkpoints, a log for TensorBoard, and at the
end `final`. `AutoModelForCausalLM.from_pretrained` reads it at full depth, and `replfx.from_pretrained` if it
is shared. Started again with the same command, a run goes on from its newest checkpoint. It needs
`pip install transformers accelerate tensorboard`.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

import replfx
from replfx.integrations.transformers import Unroll

BYTES = 256  # the vocabulary


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--model", default="gpt2", help="a type of configuration of transformers: gpt2, llama, …")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--context", type=int, default=256, help="bytes that a prediction may look back on")
    parser.add_argument("--no-replace", action="store_true", help="train the model as it is")
    parser.add_argument("--operator", default="auto", help="block, mixer, light or identity")
    parser.add_argument("--unroll-at", type=float, metavar="SHARE", help="at full depth after this share of the steps")
    parser.add_argument("--start", default="outputs", choices=("outputs", "copies"), help="of the unrolled blocks")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=32, help="windows a step and process")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=1_000, help="steps between checkpoints and validations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("run"))
    return parser.parse_args(argv)


class Windows(Dataset[dict[str, Tensor]]):
    """Consecutive windows of a text; the labels are the inputs, which transformers shifts."""

    def __init__(self, text: bytes, length: int) -> None:
        count = len(text) // length
        self.windows = torch.frombuffer(bytearray(text[: count * length]), dtype=torch.uint8).view(count, length)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        window = self.windows[index].long()
        return {"input_ids": window, "labels": window}


def train(args: argparse.Namespace) -> float:
    """Train to the end; gives the validation loss in bits a byte."""
    set_seed(args.seed)
    text = args.text.read_bytes()
    cut = len(text) * 9 // 10
    config = AutoConfig.for_model(
        args.model,
        vocab_size=BYTES,
        num_hidden_layers=args.layers,
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_attention_heads=args.heads,
        max_position_embeddings=args.context,
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = AutoModelForCausalLM.from_config(config)
    unroll = None if args.no_replace or args.unroll_at is None else Unroll(args.unroll_at, start=args.start)
    if not args.no_replace:
        example = {"input_ids": torch.zeros(2, args.context, dtype=torch.long)}
        model = replfx.transform(model, example, operator=args.operator)
        print(replfx.report(model))
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(args.output / "log")
    arguments = TrainingArguments(
        str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 20,
        weight_decay=0.1,
        eval_strategy="steps",
        eval_steps=args.save_every,
        save_steps=args.save_every,
        save_total_limit=2,
        logging_steps=max(1, args.save_every // 10),
        report_to="tensorboard",
        seed=args.seed,
    )
    optimizer = torch.optim.AdamW(replfx.parameter_groups(model, 0.1), args.learning_rate)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=Windows(text[:cut], args.context),
        eval_dataset=Windows(text[cut:], args.context),
        callbacks=None if unroll is None else [unroll],
        optimizers=(optimizer, None),  # coefficients without weight decay; the schedule is the arguments'
    )
    newest = get_last_checkpoint(str(args.output)) if args.output.is_dir() else None
    trainer.train(resume_from_checkpoint=newest)
    bits = trainer.evaluate()["eval_loss"] / math.log(2)
    print(f"validation: {bits:.3f} bits a byte")

    if trainer.is_world_process_zero():
        model.save_pretrained(args.output / "final")
    return float(bits)


if __name__ == "__main__":
    train(parse(None))
