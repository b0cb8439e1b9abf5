"""From pictures and masks to a cache on disk, and from the cache to batches."""
