"""Training the small decoder: configuration, data, the loop, checkpoints and metrics."""
