"""Linear probes on frozen features (section 2.4)."""
