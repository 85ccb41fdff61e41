"""`python -m repnext_mm_cli` is the command `repnext-mm`."""

import sys

from . import main

if __name__ == '__main__':
    sys.exit(main())
