"""Runs grids of settings and collects their results."""
