"""Searches for what features react to: top activations, contexts, co-activation, logit effects."""
