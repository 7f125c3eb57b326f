"""Training recipes, losses, metrics and examples."""
