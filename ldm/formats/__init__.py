"""Model files both ways: parts, pipeline folders, single files, CompVis names, LoRA files; atomic, checksummed writes."""
