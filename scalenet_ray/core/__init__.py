"""The algorithm on arrays: numpy alone, no torch and no Ray."""
