"""OpenAI's Responses API: a chat completion in other words, as items and numbered events, which can be kept."""
