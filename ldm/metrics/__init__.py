"""Evaluators: prompt adherence, abilities, shapes, reconstruction, Fréchet distance."""
