"""How well a model does on a split: nats per token, accuracy of its class head, the loss of every pixel, baselines."""
