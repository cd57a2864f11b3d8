"""Other libraries' checkpoints and token arrays, and their names."""
