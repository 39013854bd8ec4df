"""Data sources to decoded, ordered batches; filters, buckets, the latent cache."""
