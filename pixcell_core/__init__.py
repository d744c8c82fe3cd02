"""The model and the words everybody shares. Knows no hospital and no server."""

__version__ = "0.1.0"
