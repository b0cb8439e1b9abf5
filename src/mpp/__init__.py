"""mpp: LoRA training on frozen diffusion transformers with masked prior preservation."""

__version__ = "0.2.0.dev0"
