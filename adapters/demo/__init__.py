"""Four small trained adapters that the demo and the tests serve, and how they were made."""
