"""Evaluators: prompt adherence, reconstruction, Fréchet distance."""
