"""Deployment: one table of formats, exporters, runtimes, parity, and the report."""
