"""``tokenrelay bench``: throughput and latencies of any OpenAI-compatible server, and of several side by side.

Knows neither the model nor the service: what it measures it sees as any client would.
"""
