"""``/openapi.json``: what a route says of its operation, and the document made of them all."""
