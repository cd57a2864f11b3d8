"""What a model costs: parameters, FLOPs, memory, days on a given GPU."""
