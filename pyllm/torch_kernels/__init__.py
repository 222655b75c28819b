"""PyTorch's own fused operations behind our signatures: the peers every kernel is measured against.

A face lives here where PyTorch has one operation that does the whole job, or where the reference
would wait for the device in a step that must not. On a device where it is the fastest known, a door
may choose it; ``benchmarks/ops.py`` shows it beside the others.
"""
