"""Direct Preference Optimization and its family, in JAX."""

import os

# Models are our own: transformers need not say that it found no PyTorch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__version__ = "0.2.0"
