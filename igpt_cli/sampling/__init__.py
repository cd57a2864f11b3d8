"""Drawing images from a model: samples, completions, and pictures of them."""
