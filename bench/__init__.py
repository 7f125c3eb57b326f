"""What the engine costs and gains, measured: `make bench` runs everything, and bench/results.json holds it."""
