"""Separata shared: data."""
