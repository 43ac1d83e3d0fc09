"""Data preparation: datasets to token ids, batches and seeds."""
