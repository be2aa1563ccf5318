"""The operations that a step needs beside the model's own layers.

`reference` defines each of them in plain torch, as slowly as it likes; `cpu` computes the same in
few, large operations. Knows tensors. Knows nothing of sequences or of the model's modules.
"""
