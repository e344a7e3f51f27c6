"""What happens to one batch or one layer; torch lives here.

The collect side and the prune side never import each other: they meet in `gradpipe.store`, and
both read model files with `checkpoint`. `docs/architecture.md` says which module is on which side.
"""
