"""Peers that do what no peer should; known to a worker that imports this module."""

import os

from benchmarks.zoo.peers import PEERS
from tests.benchmarks.zoo import toys

TOY_PEERS = {
    "hangs": lambda model, inputs: toys.hang(),
    "fails": lambda model, inputs: toys.fail(),
    "exits": lambda model, inputs: os._exit(4),
    "works": lambda model, inputs: None,
    "in eval": lambda model, inputs: toys.fail() if model.training else None,
}
PEERS.update(TOY_PEERS)
