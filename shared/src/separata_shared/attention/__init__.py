"""Separata shared: attention."""
