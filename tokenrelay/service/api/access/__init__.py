"""Who asks, and what they may: API keys, who they belong to, and what a tenant's limits allow one request."""
