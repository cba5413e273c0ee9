"""What is durable, and is it intact? Rows, store, snapshots, registry. Never imports torch."""
