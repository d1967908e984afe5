"""Loss mathematics: arrays in, arrays out; no modules, no config."""
