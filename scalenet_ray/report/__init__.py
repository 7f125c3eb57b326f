"""Self-contained HTML pages of runs, readable without a network."""
