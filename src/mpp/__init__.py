"""mpp: LoRA training on frozen diffusion transformers with masked prior preservation."""

__version__ = "0.1.0"
