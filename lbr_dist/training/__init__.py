"""The training loop, its DeepSpeed engine and its checkpoints."""
