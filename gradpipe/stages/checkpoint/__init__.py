"""Model files without a model: both stages read them."""
