"""The commands of `tinymodel`, one a file, the frame they run in, and what they share."""
