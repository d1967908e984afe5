"""What a model's completions say about it: depth, its controls, calibration, faithfulness."""
