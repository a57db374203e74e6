"""Sparse dictionaries: SAEs and transcoders, and the grammar of the sites they read and write."""
