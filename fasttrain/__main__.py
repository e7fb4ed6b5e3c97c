"""`python -m fasttrain` is `fasttrain`; the deepspeed launcher starts it with `--module fasttrain`."""

import sys

from fasttrain.cli import main

sys.exit(main())
