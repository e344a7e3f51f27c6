"""What happens to one batch or one layer; torch lives here.

The collect side (samples, model, hooks, statistics, schedule, perplexity) and the prune side
(score, mask, prune) never import each other: they meet in `gradpipe.store`. `checkpoint` is the
leaf that both read model files with.
"""
