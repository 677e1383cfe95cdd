"""Separata shared: decoding."""
