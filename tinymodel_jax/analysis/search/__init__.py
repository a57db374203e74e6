"""What does a feature react to? Top activations, contexts, co-activation, logit effects."""
