"""Which known concepts did a dictionary find? Scores of features against labels, and the story world's concepts."""
