"""Adapters to frameworks; each folder needs one framework and the extra of its name."""
