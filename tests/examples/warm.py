"""Imported by the process that the others are forked from: they inherit what the first use of a library does once."""

import timm
import torch
import torch.distributed.checkpoint
import torch.distributed.fsdp
import torchvision  # noqa: F401

import replfx

torch.set_num_threads(1)
model, example = timm.create_model("test_vit", img_size=32, depth=3), torch.zeros(2, 3, 32, 32)
# Not transform, nor an operator that runs a block to read it: a process that ran a backward pass cannot be forked.
replfx.apply(model, replfx.plan(model, example, operator="block"), example)
