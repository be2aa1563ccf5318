"""The routes: what travels over HTTP, and nothing that decides."""
