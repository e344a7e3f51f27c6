"""A transformers model, taken apart."""
