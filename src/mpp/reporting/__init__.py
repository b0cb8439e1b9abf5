"""The page that shows a cache under a loss."""
