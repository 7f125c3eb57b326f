"""The embedded sample: synthetic scenes, and the tiny detector trained on them."""
