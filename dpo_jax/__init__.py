"""Direct Preference Optimization and its family, in JAX."""

import gc
import os

# Imports and traced programs are many objects that stay; looking for garbage after every 700 of them took a twentieth
# of a run's start.
gc.set_threshold(20_000)
# Models are our own: transformers need not say that it found no PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.3.0"
