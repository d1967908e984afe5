"""The loops of the commands: they fetch data, call the jitted steps and write the results."""
