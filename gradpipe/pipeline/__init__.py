"""A whole run: order, checks before work, progress, reports."""
