"""Measurements of a model beyond its accuracy."""
