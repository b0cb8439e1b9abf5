"""One file per family of diffusion transformers."""
