"""Who may ask, for which adapter, at what price. Never imports torch."""
