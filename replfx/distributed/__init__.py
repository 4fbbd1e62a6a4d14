"""Training over several processes: tensor parallelism, ranks that agree."""
