"""Separata shared: metrics."""
