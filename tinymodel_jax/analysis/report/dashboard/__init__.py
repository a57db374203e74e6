"""Static pages about all features of a dictionary: what is computed for them, and how it is written to files."""
