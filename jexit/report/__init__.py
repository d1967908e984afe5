"""Pictures and pages made from the files of a run; needs no accelerator and imports no jax."""
