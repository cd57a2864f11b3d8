"""From exact colour counts to a palette, and from images to palette indices."""
