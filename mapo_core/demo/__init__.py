"""The built-in model: a small world of drawn scenes, a model that knows it, and the main job on them."""
