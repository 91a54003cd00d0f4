"""Prepared data: from raw files to shards, and from shards to packed batches."""
