"""Data that comes with the package: the generated sample set `repnext_mm.datasets.shapes`."""
