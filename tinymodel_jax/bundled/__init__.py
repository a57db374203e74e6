"""Data that comes with the package: GPT-2 ids of TinyModel's vocabulary, the story world, and a model trained on it."""

from pathlib import Path

MINI = Path(__file__).parent / "mini"
"""Folder of the model that `TinyModel("mini")` loads; its README.md describes how it was made."""
STORY_WORLD = "storyworld"
"""What users give in place of a file to read stories of the story world."""
