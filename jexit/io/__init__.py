"""What a run writes and shows: checkpoints, metrics, samples, the progress bar."""
