"""What the user has: where media, masks and captions lie."""
