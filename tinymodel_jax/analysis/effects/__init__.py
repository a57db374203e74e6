"""What does a feature do? Sweeps, importance, attribution, patching."""
