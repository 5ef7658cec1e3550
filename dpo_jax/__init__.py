"""Direct Preference Optimization and its family, in JAX."""

__version__ = "0.2.0"
