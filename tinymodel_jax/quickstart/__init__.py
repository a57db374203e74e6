"""`tinymodel quickstart`: the bundled model at work, a dictionary trained before your eyes, and a page about both.

Offline and seeded. Everything here uses the package as anyone would: read it as an example, from `run` downwards.
"""
