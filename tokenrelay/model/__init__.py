"""Token ids in, token ids out. Knows no HTTP, no Redis, no environment."""
