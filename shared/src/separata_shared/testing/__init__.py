"""Separata shared: testing."""
