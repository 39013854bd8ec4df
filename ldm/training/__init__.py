"""Settings of a stage, the training loop, optimisers, EMA, checkpoints, log and trackers."""
