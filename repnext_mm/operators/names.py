"""The one name that the finder, which imports nothing more, shares with the rest."""

#: The compiled module of mmcv.
EXT = 'mmcv._ext'
