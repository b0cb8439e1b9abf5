"""What training takes on a GPU, measured in half an hour: `python -m benchmarks.gpu`."""
