"""What a model and its dictionaries compute, measured: metrics and searches over activations."""
