"""What is trained: adapters, and the files they are kept in."""
