"""Requests to pictures: recipes, prompt files, init images, judges, watermark, writing."""
