"""Ollama's API, for front-ends that speak no other: lines of JSON, options by Ollama's names, one model."""
