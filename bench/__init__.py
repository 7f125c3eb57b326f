"""Measurements of speed, memory and cost; `make bench` runs all and writes bench/results.json."""
