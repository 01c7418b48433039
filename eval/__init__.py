"""Measuring a model's quality."""
