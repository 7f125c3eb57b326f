"""The distributed batch job: everything that knows Ray."""
