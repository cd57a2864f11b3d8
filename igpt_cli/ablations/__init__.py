"""The papers' ablations, in minutes on one GPU or a CPU."""
