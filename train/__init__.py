"""The training programs: `python -m train prepare | lm | dictionaries`."""
