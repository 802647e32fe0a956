"""What an explanation and an audit cost, against the bare forward pass and against other packages on the same machine.

`make bench` runs it; `python -m benchmarks --help` lists its options. Enters: names of models. Leaves: raw timings as
JSON, a table as Markdown and a plot as PNG, in `benchmarks/results/`.
"""
