"""What can be trained: recipes, losses, examples."""
