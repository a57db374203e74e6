"""Self-contained HTML pages about a model and its dictionaries: one file, no network, no server."""
