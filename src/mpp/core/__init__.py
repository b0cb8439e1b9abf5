"""Masks, loss, sigma laws and draws: pure torch, no files, no global state, no logging."""
