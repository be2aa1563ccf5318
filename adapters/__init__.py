"""What a LoRA adapter is: its files, its digest, its validity, and where its bytes are kept.

The bottom library of the house. Knows nothing of SQL, HTTP or tenants.
"""
