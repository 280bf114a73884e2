"""Plans, and the only file that changes a model."""
