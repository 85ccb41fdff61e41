"""Reading a folder of images with labels, in whatever format the labels are."""

from .reading import FORMATS, read_folder
from .records import DataError, Example, LabeledFolder, Object
from .splitting import split_examples

__all__ = [
    'FORMATS',
    'DataError',
    'Example',
    'LabeledFolder',
    'Object',
    'read_folder',
    'split_examples',
]
