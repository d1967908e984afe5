"""The loops behind the commands: each fetches data, calls jitted steps and writes the results."""
