"""Which known concepts did a dictionary find? Labels, and their recovery."""
