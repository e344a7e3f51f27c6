"""A grid of prunings of one model, each measured, none written."""
