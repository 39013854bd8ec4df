"""A run: models and stages, keys, plan, execution, run folder, report."""
