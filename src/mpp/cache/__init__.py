"""What preparing leaves on disk for training."""
