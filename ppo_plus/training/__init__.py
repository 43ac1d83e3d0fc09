"""Parts of a run around its algorithm: checkpoints, resuming, evaluation, validation, the Hub."""
