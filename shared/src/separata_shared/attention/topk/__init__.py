"""Separata shared: attention topk."""
