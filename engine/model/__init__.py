"""transformers' own modelling code, made to serve: paged attention in, LoRA slots in, checked.

Knows modules and tensors. Knows nothing of sequences, steps or sampling.
"""
