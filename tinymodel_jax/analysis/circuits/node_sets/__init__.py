"""Which set of nodes carries a behaviour over many prompts: found, run by itself, and scored."""
