"""Helpers for tests: golden files (``parity``) and Hypothesis inputs (``strategies``)."""
