"""From sources to a cache."""
