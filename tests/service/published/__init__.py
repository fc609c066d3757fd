"""Answers are what the published OpenAPI documents of OpenAI and Anthropic say they are."""
