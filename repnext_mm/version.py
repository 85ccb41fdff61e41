"""The package's version; CHANGELOG.md and CITATION.cff carry the same one."""

__version__ = '0.1.0'
