"""Loss functions of arrays, which need neither modules nor a config."""
