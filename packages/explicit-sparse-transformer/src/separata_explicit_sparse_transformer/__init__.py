"""Explicit Sparse Transformer (Zhao et al. 2019, arXiv:1912.11637)."""
