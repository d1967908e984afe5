"""What this machine is, whether it computes what it should, and how fast."""
