"""Evaluate a model on a split: nats per token, class accuracy, per-pixel loss, baselines."""
