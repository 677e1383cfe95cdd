"""Separata shared: attention dense."""
