"""Captions as a text encoder gave them: encoded once, kept beside the shards, padded on the device."""
