"""What lets a model fit: weights in fewer bits. It knows layers and blocks, and no family."""
