"""What is asked of the server rather than of the model: health, readiness, the status of a request, usage, adapters."""
