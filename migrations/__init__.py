"""The schema's history, in order. Says in SQL what `gateway/tables.py` cannot."""
