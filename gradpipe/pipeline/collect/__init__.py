"""Stage one as a run: fix the samples, work through them, finish the store."""
