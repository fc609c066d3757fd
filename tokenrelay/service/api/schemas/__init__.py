"""What travels over HTTP, in OpenAI's shapes. Knows no broker and no tokens' meaning."""
