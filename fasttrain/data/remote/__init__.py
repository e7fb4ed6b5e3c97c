"""Shards in a store: fetched ahead through a bounded cache on this machine, and tried again while failures pass."""
