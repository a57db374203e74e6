"""Recovery of known concepts by features: scores against labels, and the story world's concepts."""
