"""Stage two: which weights of a layer go, and what becomes of the rest."""
