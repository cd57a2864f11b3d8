"""igpt: the iGPT pixel pipeline, as a library (docs/python.md) and a command line."""

__version__ = "0.1.0"
