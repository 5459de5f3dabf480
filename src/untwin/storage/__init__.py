"""Everything that touches a file, local or remote: inputs, partitions, shards, manifests."""
