"""From a capture to a plan: chains of blocks, and which of them are replaced."""
