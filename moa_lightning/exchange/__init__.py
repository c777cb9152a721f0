"""Weights in and out: one safetensors file, encoders from and for timm, language models for transformers.

Modules are imported where they are used: the package itself must stay quick to import.
"""
