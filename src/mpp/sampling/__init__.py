"""Prompts, and the images and clips that are generated from them."""
