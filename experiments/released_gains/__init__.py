"""Gains of released DeepSeek-V4 checkpoints: python -m experiments.released_gains --help"""
