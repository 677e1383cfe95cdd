"""Separata shared: nn."""
