"""Tokens in, tokens out: one base model, many LoRA slots, one batch.

Knows slots and blocks. Knows nothing of text, tenant names, money or SQL.
"""
