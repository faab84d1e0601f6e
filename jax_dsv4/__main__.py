"""``python -m jax_dsv4``: the demo."""

import sys

from jax_dsv4.demo.cli import main

if __name__ == "__main__":
    sys.exit(main())
