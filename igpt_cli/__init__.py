"""igpt: the iGPT pixel pipeline as a library and a command line. See docs/python.md."""

__version__ = "0.1.0"
