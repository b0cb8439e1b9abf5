"""The phantom-limb experiment: a toy world, its base model, and what an adapter trained on a mask does to it."""
