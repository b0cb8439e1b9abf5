"""mpp: LoRA training on frozen diffusion transformers with masked prior preservation."""

import time

__version__ = "0.2.0.dev0"
BEGAN = time.monotonic()  # the first of mpp that a process runs: of a command, what its user began to wait at
