"""How programs run here: compilation, memory, progress bars, atomic files and paths."""
