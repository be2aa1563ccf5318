"""Choose tokens: the logits of a step go in, the next token of each sequence comes out.

`sampler` owns what is kept from one step to the next; `rows`, `adjustments` and `draws` are the
parts of it, `noise` and `logprobs` are plain mathematics. Knows nothing of text or of schedules.
"""
