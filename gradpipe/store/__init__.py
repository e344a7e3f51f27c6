"""The on-disk truth: numpy and zarr, no torch. The format is written in `docs/store-format.md`."""
