"""Deployment: what is exported, the formats, the comparison with PyTorch, and the report."""
