"""Token files: images as rows of palette indices in HDF5, memory-mapped."""
