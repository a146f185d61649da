"""The version of engine and module."""

__version__ = "0.1.0"
