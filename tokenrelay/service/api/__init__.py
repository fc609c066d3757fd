"""The API's process: HTTP in, server-sent events out. Stateless, and without torch."""
