"""trine: distributed pretraining of Differential Transformer, RetNet and YOCO language models on Megatron-Core."""

__version__ = "0.1.0"
