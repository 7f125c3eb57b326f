"""The embedded sample: scenes, and the tiny detector that was trained on them."""
