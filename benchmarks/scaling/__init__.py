"""What several ranks gain and cost: speed, communication, and a model of many GPUs.

    torchrun --nproc-per-node 4 -m benchmarks.scaling          the tables of docs/scaling.md: five minutes on two cores
    torchrun --nproc-per-node 2 -m benchmarks.scaling --smoke  small sizes: does it run?
    python -m benchmarks.scaling.model                         the tables again, from the figures that were kept

Each rank computes on one thread of a CPU, and gloo joins them. All ranks that are started take part in turn: a way that
needs fewer runs on the first of them, while the others wait without work. Ways alternate in rounds, so that a slow
stretch of the machine falls on all of them.
"""
