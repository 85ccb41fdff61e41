"""Metrics for MMEngine evaluators."""
