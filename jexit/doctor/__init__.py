"""A check of this machine: its hardware and software, the correctness of its results, its speed."""
