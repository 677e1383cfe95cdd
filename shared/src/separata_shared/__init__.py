"""Transformer blocks, attention kernels and metrics shared by the separata packages."""

__version__ = "0.1.0"
