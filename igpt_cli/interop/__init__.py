"""Other people's checkpoints and token arrays; the only room that knows their names."""
