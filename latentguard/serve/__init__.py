"""A guard as an HTTP server that OpenAI's clients can ask (docs/serving.md). Imports nothing until it is asked to."""
