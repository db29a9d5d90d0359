"""`python -m lora_lab` is `lora-lab`."""

import sys

from lora_lab.cli import main

if __name__ == "__main__":  # worker processes import this module as well
    sys.exit(main())
