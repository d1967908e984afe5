"""Draws charts and pages from the files of a run, without an accelerator and without JAX."""
