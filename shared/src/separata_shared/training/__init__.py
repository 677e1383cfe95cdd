"""Separata shared: training."""
