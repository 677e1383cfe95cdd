"""Settings for all tests of the shared library."""

import os

import torch
from hypothesis import settings

# The first example pays for imports, and a busy machine is no failure.
settings.register_profile("shared", deadline=None)
settings.load_profile("shared")

# Triton reads this when it is imported, which parts of torch do.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
