"""From datasets to token ids, batches and seeds."""
