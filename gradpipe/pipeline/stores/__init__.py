"""Runs over finished stores: copied, exported, described."""
