"""The transformer, its hook points, interventions on them, and generation."""
