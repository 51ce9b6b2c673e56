"""Training: configuration, data to batches to steps, checkpoints, balancing, and what a run leaves behind."""
