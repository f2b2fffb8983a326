"""Model inputs that are neither pictures nor a vector: prompts, noise."""
