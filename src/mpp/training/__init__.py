"""Teacher and student on batches of a cache: the step, its Lightning shell, and what a run shows and saves."""
