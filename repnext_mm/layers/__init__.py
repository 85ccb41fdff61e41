"""Layers that the families share, and the one door to computing them fast."""
