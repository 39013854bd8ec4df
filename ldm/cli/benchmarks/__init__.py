"""Rows of `ldm bench`: ldm beside its peers on this machine."""
