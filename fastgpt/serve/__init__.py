"""Serve models over HTTP: the routes of OpenAI's API over one engine in a process of its own."""
