"""`python -m ring_attn ...` is `ring-attn ...`."""

import sys

from ring_attn.cli import main

if __name__ == "__main__":
    sys.exit(main())
