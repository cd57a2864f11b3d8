"""Training: objectives, optimizers, one loop for pretraining and fine-tuning."""
