"""Yoke: the computers people already own, pulling together as one machine that runs large language models."""

__version__ = "0.1.0"
