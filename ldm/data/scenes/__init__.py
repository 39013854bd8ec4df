"""Scenes, the built-in data set: specification, rendering, captions and the exact checker."""
