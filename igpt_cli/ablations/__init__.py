"""The papers' ablations at a size that one GPU, or a CPU, does in minutes."""
