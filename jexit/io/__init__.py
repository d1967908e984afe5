"""Reads and writes the files of models and runs, and shows the progress of a run."""
