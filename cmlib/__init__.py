"""cmlib: learn, reproduce and ship consistency models."""

__version__ = "0.1.0"
