"""Making and changing masks: files in, files out, nothing of training."""
