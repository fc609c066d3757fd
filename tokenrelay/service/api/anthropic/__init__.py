"""Anthropic's Messages API: its bodies become chat completions, and their answers are told in its own events."""
