"""`python -m lora_lab` is `lora-lab`."""

import sys

from lora_lab.cli import main

sys.exit(main())
