"""Computing: the network and what it is made of. Knows nothing of requests or scheduling."""
