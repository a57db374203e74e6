"""Data files that come with the package: the GPT-2 id table of TinyModel's vocabulary."""
