"""From colour counts to a palette, and from images to tokens."""
