"""What a run needs beside the algorithm: checkpoints, resuming, evaluation, validation, the Hub."""
