"""``python -m cvae_dist``, the same as ``cvae-dist``."""

import sys

from cvae_dist.cli import main

if __name__ == "__main__":
    sys.exit(main())
