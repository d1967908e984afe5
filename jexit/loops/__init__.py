"""Loops: they fetch data, call the jitted steps and write what came of it."""
