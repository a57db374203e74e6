"""Compilation, memory, progress bars, atomic files and paths."""
