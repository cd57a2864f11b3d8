"""Draw images from a model: samples, completions, pictures of them."""
