"""Curation of image-text tables: rules, near-duplicates, hashes, downloads."""
