"""One file per DiT family: all it knows about latents, conditioning and timestep convention."""
