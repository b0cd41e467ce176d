"""How the mixers are computed: pure tensor functions, each fast path beside a naive reference.

No communication and no modules: every function takes and returns tensors, laid out as (batch, heads, time,
width).
"""
