"""Caches of musubi-tuner and blissful-tuner."""
