"""`python -m tt_fast` is `tt-fast`."""

import sys

from tt_fast.cli import main

sys.exit(main())
