"""How XLA compiles in tests and in the programs that they start, as XLA_FLAGS."""

from importlib.metadata import version

# What is compiled here runs once or twice: optimization and the emitters of fused loops, which are made for fast
# programs, would take longer than they save. From jaxlib 0.11 on there are no other emitters, and no such flag.
_EMITTERS = ["--xla_cpu_use_fusion_emitters=false"] * version("jaxlib").startswith("0.10.")
FLAGS = " ".join(["--xla_backend_optimization_level=0", *_EMITTERS])
