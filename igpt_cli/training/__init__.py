"""Training: objectives, optimizers, and the pretraining loop."""
