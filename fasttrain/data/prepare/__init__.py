"""Sources of images, turned into shards."""
