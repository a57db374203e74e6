"""Static pages about all features of a dictionary: computing their content, and writing the files."""
