"""WebDataset shards made elsewhere: indexed at first use by a strict reader of our own, decoded as they are read."""
