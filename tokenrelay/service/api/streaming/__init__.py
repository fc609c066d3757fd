"""An answer as a stream: server-sent events, signs of life, the place in the queue, and a definite end."""
