"""Stage one: what is summed of each layer, and in which order blocks run."""
