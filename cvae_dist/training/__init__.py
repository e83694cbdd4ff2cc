"""Train a model: which rows come next, how they arrive, the loop, checkpoints, ranks."""
