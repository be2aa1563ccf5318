"""Other servers of language models and Manylora, side by side on one machine.

    python -m benchmarks.peers --peers manylora vllm-1 --concurrency 1 8 32 --adapters 0 8 --pairs 5
    python -m benchmarks.peers.report benchmarks/results/peers.json

A file for each peer says how it is installed, started and asked; `foreign/` holds what runs inside
a peer's own environment and imports nothing of ours. `scene.py` makes what all are asked,
`truth.py` what PEFT answers to it, `load.py` asks, `watch.py` looks at the machine meanwhile,
`figures.py` makes medians and intervals of it, and `report.py` the table and the plot.
"""
